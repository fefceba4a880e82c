"""Whether launches are programmatic dependent ones (kernels/pdl.py).

Not yet run on hardware, so not the default: STF_KERNELS_PDL=1 turns it on, for NVIDIA GPUs from sm_90 on.
"""

import os

import torch

from .descriptors import is_hopper_or_later


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Compiler options of a launch on `device`: {"launch_pdl": True} or none."""
    if os.environ.get("STF_KERNELS_PDL") == "1" and device.type == "cuda" and is_hopper_or_later(device):
        return {"launch_pdl": True}
    return {}
