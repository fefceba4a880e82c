"""Whether launches are programmatic dependent ones (kernels/pdl.py).

Not yet run on hardware, so the default only where a table has measured it (tuning/launches.py); STF_KERNELS_PDL=1
turns it on, 0 off, for NVIDIA GPUs from sm_90 on.
"""

import torch

from ..tuning import gpu_index, launches_by_default
from .descriptors import is_hopper_or_later


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Compiler options of a launch on `device`: {"launch_pdl": True} or none."""
    if device.type != "cuda" or not is_hopper_or_later(device):
        return {}
    return {"launch_pdl": True} if launches_by_default("pdl", gpu_index(device)) else {}
