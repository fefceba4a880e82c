"""What answers lose with fewer vision tokens: `python -m bench.quality`; data in data.py, the study in study.py."""
