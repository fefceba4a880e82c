"""From a product to its configuration: the device's table if it knows the stage, else the model's.

choose         for y [m, n] = A [m, k] @ W^T
choose_wgrad   for dW [n, k], a sum over m rows
reject         what serves in place of a configuration that did not run
"""

import functools
import warnings

import torch

from .config import GemmConfig
from .model import default_config, default_wgrad_config, smallest
from .tables import device_identity, table_of

INTERPRETER_CONFIG = GemmConfig(block_m=32, block_n=32, block_k=32, group_m=2)

# (slug, itemsize, of a weight gradient, configuration) that did not run in this process: the two kernels share tiles.
_rejected: set[tuple[str, int, bool, GemmConfig]] = set()


def gpu_index(device: torch.device) -> int:
    """Of a GPU; "cuda" without an index is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache(maxsize=4096)
def _choose(slug: str, arch: str, stage: str, dtype: torch.dtype, m: int, n: int, k: int) -> GemmConfig | None:
    choices = table_of(slug, arch).get((stage, str(dtype).removeprefix("torch."), n, k))
    for m_max, config in choices or ():
        if m <= m_max:
            return config
    # Beyond the table: split K's workspace would grow with M, gigabytes for what a table of one image says.
    if choices and not (choices[-1][1] is not None and choices[-1][1].is_for_few_rows):
        return choices[-1][1]
    # Of any stage's weight gradient, also of one that no table can name: a cropped linear layer's.
    return None if stage.endswith("_wgrad") else default_config(arch, dtype.itemsize, m, n)


def choose(
    device: torch.device,
    stage: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    *,
    forced: bool = False,
    save_pre: bool = False,
) -> GemmConfig | None:
    """The configuration for y [m, n] = A [m, k] @ W^T at a stage of `tables.STAGES` on `device`.

    None, plain torch, where the table says that it is faster, unless `forced`. save_pre: the pre-activation is stored
    too. On the CPU (the interpreter) it is one small configuration: nothing there depends on speed.
    """
    if device.type == "cpu":
        return INTERPRETER_CONFIG
    slug, arch = device_identity(gpu_index(device))
    config = _choose(slug, arch, stage, dtype, m, n, k)
    # Tables are measured without the pre-activation's store, which wants smaller tiles.
    if (config is None and forced) or (config is not None and save_pre):
        config = default_config(arch, dtype.itemsize, m, n, save_pre=save_pre)
    return smallest(dtype.itemsize) if (slug, dtype.itemsize, False, config) in _rejected else config


def choose_wgrad(
    device: torch.device, stage: str, dtype: torch.dtype, m: int, n: int, k: int, *, forced: bool = False
) -> GemmConfig | None:
    """The weight gradient's configuration for dW [n, k], a sum over m rows, of a stage that merges or concatenates.

    None, the library GEMM, where no table names the kernel, unless `forced`, and where it did not run.
    """
    if device.type == "cpu":
        return INTERPRETER_CONFIG
    slug, arch = device_identity(gpu_index(device))
    config = _choose(slug, arch, f"{stage}_wgrad", dtype, m, n, k)
    if config is None and forced:
        config = default_wgrad_config(arch, dtype.itemsize, n, k)
    return None if (slug, dtype.itemsize, True, config) in _rejected else config


def reject(
    device: torch.device, dtype: torch.dtype, config: GemmConfig, reason: Exception, *, wgrad: bool = False
) -> GemmConfig | None:
    """Never choose a configuration again on a device in this process, and warn, once for each.

    Returns what serves instead: the smallest one or, if wgrad, None for the library GEMM. Raises `reason` where the
    smallest one itself does not run.
    """
    slug, arch = device_identity(gpu_index(device))
    instead = None if wgrad else smallest(dtype.itemsize)
    if config == instead:
        raise reason
    rejected = slug, dtype.itemsize, wgrad, config
    if rejected not in _rejected:
        _rejected.add(rejected)
        warnings.warn(
            f"stf_kernels: {config} does not run on {slug} ({arch}): {reason}. {instead or 'the library GEMM'} serves "
            "instead; `python -m stf_kernels.tune` finds better ones",
            stacklevel=3,
        )
    return instead
