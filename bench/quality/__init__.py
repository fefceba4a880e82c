"""What answers lose with fewer vision tokens: `python -m bench.quality`; the study is in study.py."""
