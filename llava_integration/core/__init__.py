"""What every family of LLaVA-STF models shares; a family is one file beside this folder, such as llava_stf.py."""
