"""What every family of LLaVA-STF models shares; a family is one file beside this folder, such as llava_stf.py.

config       layers, window, widths and token counts that agree with the vision tower
tower        the hidden states that are asked for, from only the layers that they need
projector    the CompactTokenProjector of a configuration
insertion    where image tokens are in a prompt, and whether there are as many as the images need
model        the parts of model and generation that do not depend on the family
register     the Auto classes and the checkpoint loader of transformers
"""
