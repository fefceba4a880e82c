"""From a product to its configuration: the device's table if it knows the stage, else the model's.

choose   for y [m, n] = A [m, k] @ W^T, or for a weight gradient
reject   what serves in place of a configuration that did not run
"""

import functools
import warnings

import torch

from .config import GemmConfig
from .model import default_config, smallest
from .tables import device_identity, multiprocessors, table_of

INTERPRETER_CONFIG = GemmConfig(block_m=32, block_n=32, block_k=32, group_m=2)

# (slug, itemsize, of a weight gradient, configuration) that did not run in this process: the two kernels share tiles.
_rejected: set[tuple[str, int, bool, GemmConfig]] = set()


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
    """The configuration for y [m, n] = A [m, k] @ W^T at a stage of `tables.STAGES` on `device`, or for the weight
    gradient dW [m, n], a sum over k rows, at "concat_wgrad", "merge_wgrad" or "linear_wgrad".

    None, plain torch, where the table says that it is faster, unless `forced`; for a weight gradient also where no
    table names the kernel, and where it did not run. save_pre: the pre-activation is stored too.
    """
    if device.type == "cpu":  # the interpreter: nothing there depends on speed
        return INTERPRETER_CONFIG
    index = torch.cuda.current_device() if device.index is None else device.index  # "cuda" is the current one
    wgrad = stage.endswith("_wgrad")
    config = _choose(index, stage, dtype, m, n, k)
    # Tables are measured without the pre-activation's store, which wants smaller tiles.
    if (config is None and forced) or (config is not None and save_pre):
        config = _default(index, dtype.itemsize, m, n, k, save_pre, wgrad)
    rejected = config is not None and (device_identity(index)[0], dtype.itemsize, wgrad, config) in _rejected
    return (None if wgrad else smallest(dtype.itemsize)) if rejected else config


@functools.lru_cache(maxsize=4096)
def _choose(index: int, stage: str, dtype: torch.dtype, m: int, n: int, k: int) -> GemmConfig | None:
    name, wgrad = str(dtype).removeprefix("torch."), stage.endswith("_wgrad")
    rows, shape = (k, (m, n)) if wgrad else (m, (n, k))  # a table knows both by the rows of A and the shape of W
    choices = table_of(*device_identity(index)).get((stage, name, *shape))
    for m_max, config in choices or ():
        if rows <= m_max:
            return config
    # Beyond the table: split K's workspace would grow with M, gigabytes for what a table of one image says.
    if choices and (config is None or (config.split_k == 1 and config.form != "swap_ab")):
        return config
    return None if wgrad else _default(index, dtype.itemsize, m, n, k, False, False)


@functools.lru_cache(maxsize=4096)
def _default(index: int, itemsize: int, m: int, n: int, k: int, save_pre: bool, wgrad: bool) -> GemmConfig:
    arch, count = device_identity(index)[1], multiprocessors(index)
    return default_config(arch, itemsize, m, n, k, multiprocessors=count, save_pre=save_pre, wgrad=wgrad)


def reject(
    device: torch.device, dtype: torch.dtype, config: GemmConfig, reason: Exception, *, wgrad: bool = False
) -> GemmConfig | None:
    """Never choose a configuration again on a device in this process, and warn once -> what serves instead.

    That is the smallest one or, if wgrad, None for the library GEMM; where it is itself rejected, `reason` is raised.
    """
    slug, arch = device_identity(torch.cuda.current_device() if device.index is None else device.index)
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
