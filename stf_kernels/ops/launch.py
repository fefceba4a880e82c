"""A stage in Triton: configuration in, kernel started.

    y = act(A @ W^T + b)    kernels/segmented_linear.py, tma.py or swap_ab.py

A call that repeats an earlier one on NVIDIA is launched as that one was: binding its arguments costs more than the
launch. Under the interpreter outputs are fp32 and torch rounds them: a store into bf16 truncates there.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..backend import interpreting, on_device
from ..configs import GemmConfig
from . import first_use, tma, torch_path
from .segments import Stage


class Ready(NamedTuple):
    """What every call with the same layout of its operands repeats."""

    config: GemmConfig | None  # None: plain torch, after a kernel that did not run
    compiled: Any = None  # Triton's compiled kernel
    grid: tuple[int, int, int] = (0, 0, 0)
    sizes: tuple = ()  # its arguments behind the tensors


# Of every problem, whatever the layout of its operands; None, plain torch, also of a chain of such problems.
_chosen: dict[tuple, GemmConfig | None] = {}
_UNKNOWN: Any = object()
_ready: dict[tuple, Ready] = {}
_MOST_KEPT = 4096
_warned: set[tuple[str, bool]] = set()


def run_stage(
    blocks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stage: Stage,
    config: GemmConfig | None = None,
    *,
    forced: bool = False,
    save_pre: bool = False,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run one stage -> (y, pre-activation [M, N] or None).

    blocks: [B, T, C] each, weight [N, K], bias [N]; read in place where the last axis is contiguous, else copied.
    config: that kernel and no other, or an error that says why it does not run. None is the device's choice, which
        may be plain torch unless `forced`; what does not run is replaced.
    out [R, N], rows [M] int64: row i of the GEMM is written to out[rows[i]], and y is out; rows outside [0, R) are
        not written.
    """
    x, gemm = blocks[0], _gemm(blocks, weight, stage, save_pre)
    problem = _problem(x.device, gemm, forced)
    key = _key(problem, config, stage, blocks, weight, bias, out, rows)
    ready = _ready.get(key)
    if ready is None:  # perhaps for operands that are copied first
        blocks, weight = [with_contiguous_last(block) for block in blocks], with_contiguous_last(weight)
        bias, rows = (None if vector is None else with_contiguous_last(vector) for vector in (bias, rows))
        key, x = _key(problem, config, stage, blocks, weight, bias, out, rows), blocks[0]
        ready = _ready.get(key)
    if ready is None:
        tile = config
        if config is None:
            product = first_use.Product(ARGUMENTS, blocks, weight, bias, stage, save_pre, out)
            tile = chosen(x.device, gemm, forced, functools.partial(first_use.measure, product))
            key = key if problem in _chosen else None  # the next call may choose otherwise
        ready = Ready(tile)
    if ready.config is None:
        return torch_path.run_stage(blocks, weight, bias, stage, save_pre, out=out, rows=rows)
    m, n = gemm.m, gemm.n
    store_dtype = torch.float32 if interpreting() else x.dtype
    if out is None:
        y = torch.empty(stage.out_shape(x.shape, n), device=x.device, dtype=store_dtype)
    else:
        y = out.resolve_neg()  # in a dtype of its own under autocast
        y = y.float() if interpreting() else y
    pre = torch.empty((m, n), device=x.device, dtype=store_dtype) if save_pre else None
    tensors = tuple(blocks), weight, bias, y, pre, rows
    with on_device(x.device):
        while m and n and (tile := ready.config) is not None:  # written out here: six frames to a launch are enough
            try:
                if ready.compiled is not None and tile.form == "pointer":
                    ready.compiled[ready.grid](*tensors, *split_k_scratch(tile, ready.grid[0], x.device), *ready.sizes)
                    break
                kernel, grid, operands, sizes, constants = ARGUMENTS[tile.form](tile, tensors, stage)
                behind = sizes + tuple(constants[name] for name in kernel.arg_names[len(operands) + len(sizes) :])
                if ready.compiled is not None and ready.sizes == behind:
                    ready.compiled[grid](*operands, *behind)
                    break
                compiled = kernel[grid](*operands, *sizes, **constants, **tile.compiler_options())
            except Exception as error:  # another one is raised again
                ready = Ready(_instead(tile, error, x, exact=config is not None, forced=forced))
                continue
            if compiled is not None and key is not None and torch.version.hip is None:
                _keep(_ready, key, Ready(tile, compiled, grid, behind))
            break
    if ready.config is None:
        y = pre = tensors = operands = None  # let go: plain torch's own operands may be twice as large
        return torch_path.run_stage(blocks, weight, bias, stage, save_pre, out=out, rows=rows)
    if out is not None and y is not out:
        out.copy_(y.to(out.dtype))  # between dtypes copy_ loses a pending sign
    elif out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written through a pointer: tell autograd
    if store_dtype is not x.dtype:
        y, pre = y.to(x.dtype), None if pre is None else pre.to(x.dtype)
    return y if out is None else out, pre


def chosen(device: torch.device, gemm: configs.Gemm, forced: bool, measure: configs.Measure) -> GemmConfig | None:
    """configs.choose, which is not asked again once no selection is to come. An empty product is not measured."""
    problem = _problem(device, gemm, forced)
    config = _chosen.get(problem, _UNKNOWN)
    if config is _UNKNOWN:

        def trial(candidates: list[GemmConfig], failed: dict[GemmConfig, str], rounds: int) -> dict:
            try:
                return measure(candidates, failed, rounds)
            finally:
                if failed:  # what is wrong at one product serves no other, of which it was chosen before
                    forget()

        worth = gemm.m and gemm.n and gemm.k
        config, settled = configs.choose(device, gemm, forced=forced, measure=trial if worth else None)
        if settled:
            _keep(_chosen, problem, config)
    return config


def is_plain(blocks: Sequence[Tensor], weight: Tensor, stage: Stage, save_pre: bool) -> bool:
    """Whether plain torch is known to serve a stage that is not forced."""
    return _chosen.get(_problem(blocks[0].device, _gemm(blocks, weight, stage, save_pre), False), _UNKNOWN) is None


def chain_of(blocks: Sequence[Tensor], weights: Sequence[Tensor], plan: Any, keep: Sequence[bool]) -> tuple:
    """All that the choices of a chain's products can depend on."""
    x = blocks[0]
    return plan, *keep, len(blocks), x.shape, *[weight.shape for weight in weights], *_around(x.device, x.dtype)


def chain_is_plain(chain: tuple) -> bool:
    return _chosen.get(chain, _UNKNOWN) is None


def keep_plain(chain: tuple) -> None:
    """Of a chain each of whose stages `is_plain`, not to be asked one by one again."""
    _keep(_chosen, chain, None)


def forget() -> None:
    """The next call of every product chooses anew, from what is known by now."""
    _chosen.clear()
    _ready.clear()


def _keep(kept: dict, key: tuple, value: Any) -> None:
    if len(kept) >= _MOST_KEPT:
        kept.clear()
    kept[key] = value


def _gemm(blocks: Sequence[Tensor], weight: Tensor, stage: Stage, save_pre: bool) -> configs.Gemm:
    x, (n, k) = blocks[0], weight.shape
    return configs.Gemm(stage.kind(len(blocks)), x.dtype, x.shape[0] * stage.tokens(x.shape), n, k, save_pre)


def _problem(device: torch.device, gemm: configs.Gemm, forced: bool) -> tuple:
    """All that a choice can depend on."""
    return gemm, forced, *_around(device, gemm.dtype)


def _around(device: torch.device, dtype: torch.dtype) -> tuple:
    return device, dtype, configs.uses_tf32(dtype), torch.are_deterministic_algorithms_enabled()


def _key(problem, config, stage, blocks, weight, bias, out, rows) -> tuple:
    """All of a call that its compiled kernel or an argument but a pointer can depend on."""
    tensors = [t for t in (*blocks, weight, bias, out, rows) if t is not None]
    return (
        problem, config, stage, blocks[0].shape, bias is None, None if out is None else out.shape[0],
        tuple([(t.stride(), t.dtype, t.data_ptr() % 16, t.is_neg()) for t in tensors]),
    )  # fmt: skip


def _instead(config: GemmConfig, error: Exception, x: Tensor, *, exact: bool, forced: bool) -> GemmConfig | None:
    """What serves in place of a configuration that did not run: plain torch, or if forced the portable kernel where it
    is the operands that have no descriptor. Raises an error that is not the configuration's, or whose cause was named.
    """
    refused = tma.is_refusal(config, error)
    if refused and not isinstance(error, tma.Refused):
        error = tma.Refused(f"the driver refuses the descriptor: {error}")
        if not exact and (seen := (str(x.device), x.is_contiguous())) not in _warned:
            _warned.add(seen)
            serves = "the pointer kernel" if forced else "plain torch"
            warnings.warn(f"stf_kernels: {error}; {serves} serves instead", stacklevel=3)
    if exact or not isinstance(error, does_not_run()) or (forced and not refused):
        raise error
    if not refused:
        configs.reject(x.device, x.dtype, config, error)
        forget()
    return config.portable() if forced else None


def does_not_run() -> tuple[type[Exception], ...]:
    """What a launch raises for a configuration that asks of a GPU or its driver what they do not have."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources, tma.Refused


def with_contiguous_last(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, as of every hidden state; else a copy, and one of its own sign."""
    x = x.resolve_neg() if x.is_neg() else x
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def fast_activation(dtype: torch.dtype) -> int:
    """How kernels/activations.py may compute where results are of a dtype."""
    if dtype.itemsize > 2:
        return 0
    return 1 if interpreting() or torch.version.hip is not None else 2


def split_k_scratch(config: GemmConfig, tiles: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """fp32 room for every part of every tile, and a counter of arrivals a tile; none where K is not split."""
    if config.split_k == 1:
        return None, None
    accumulators = 2 if config.form == "swap_ab" else 1
    elements = tiles * config.split_k * accumulators * config.block_m * config.block_n
    room = torch.empty(elements, device=device, dtype=torch.float32)
    return room, torch.zeros(tiles, device=device, dtype=torch.int32)


def _of_all_forms(config: GemmConfig, tensors: tuple, stage: Stage) -> tuple[tuple, tuple, dict[str, Any]]:
    """The grid, the first seven sizes and the constants of every kernel."""
    (x, *_), weight, bias, y, pre, rows = tensors
    n, tokens = weight.shape[0], stage.tokens(x.shape)
    m = x.shape[0] * tokens
    grid = -(-m // config.rows) * -(-n // config.block_n), config.split_k, 1
    constants = config.constants() | {
        "C": x.shape[-1],
        "MERGE_OUT": stage.merge_out,
        "INDEX_ROWS": rows is not None,
        "ACTIVATION": stage.activation or "none",
        "FAST_ACTIVATION": fast_activation(x.dtype),
        "HAS_BIAS": bias is not None,
        "SAVE_PRE": pre is not None,
        "INPUT_PRECISION": "tf32" if configs.uses_tf32(x.dtype) else "ieee",
        "PDL": config.pdl,
    }
    return grid, (m, n, tokens, *stage.grid, y.stride(-2), y.shape[0]), constants


# One function a form: (configuration, tensors, stage) -> kernel, grid, its tensors, its sizes, its constants.


def _pointer(config: GemmConfig, tensors: tuple, stage: Stage) -> tuple:
    from ..kernels.segmented_linear import _segmented_linear_fwd_kernel

    grid, sizes, constants = _of_all_forms(config, tensors, stage)
    blocks, weight, *_ = tensors
    strides = [block.stride()[:2] for block in blocks]
    uniform = len(set(strides)) == 1
    strides_b, strides_t = zip(*(strides[:1] if uniform else strides), strict=True)
    aligned = all(block.data_ptr() % 16 == 0 for block in blocks)
    constants |= {
        "NUM_BLOCKS": len(blocks),
        "ALIGNMENT": 0 if torch.version.hip else 16 // weight.element_size() if aligned else 1,
        "MERGE_IN": stage.merge_in,
        "UNIFORM_STRIDES": uniform,
        "SPLIT_K": config.split_k,
    }
    operands = *tensors, *split_k_scratch(config, grid[0], weight.device)
    return _segmented_linear_fwd_kernel, grid, operands, (*sizes, strides_b, strides_t, weight.stride(0)), constants


def _tma(config: GemmConfig, tensors: tuple, stage: Stage) -> tuple:
    from ..kernels.tma import _segmented_linear_tma_fwd_kernel

    grid, sizes, constants = _of_all_forms(config, tensors, stage)
    blocks, weight, *others = tensors
    layout = tma.layout_of(blocks, weight, stage, config)
    box_rows = layout.box_rows(config.block_m)
    x_desc = layout.blocks(constants["C"], (1, 1, box_rows, config.block_k))
    w_desc = tma.descriptor(weight, weight.shape, weight.stride()[:1], (config.block_n, config.block_k))
    operands = x_desc, w_desc, layout.base, blocks, *others
    constants |= {"NUM_BLOCKS": len(blocks), "UNIT": layout.unit, "BOX_M": box_rows}
    return _segmented_linear_tma_fwd_kernel, grid, operands, (*sizes, layout.image_rows), constants


def _swap_ab(config: GemmConfig, tensors: tuple, stage: Stage) -> tuple:
    from ..kernels.swap_ab import _linear_swap_ab_fwd_kernel

    grid, sizes, constants = _of_all_forms(config, tensors, stage)
    blocks, weight, *others = tensors
    layout = tma.layout_of(blocks, weight, stage, config)
    shape = layout.image_rows, constants["C"]
    main, tail = (
        tma.descriptor(layout.base, shape, (layout.pitch_row,), (rows, config.block_k))
        for rows in (config.block_m, config.tail_m)
    )
    w_desc = tma.descriptor(weight, weight.shape, weight.stride()[:1], (config.block_n, config.block_k))
    operands = main, tail, w_desc, *others, *split_k_scratch(config, grid[0], weight.device)
    constants |= {"TAIL_M": config.tail_m, "SPLIT_K": config.split_k}
    return _linear_swap_ab_fwd_kernel, grid, operands, sizes, constants


ARGUMENTS = {"pointer": _pointer, "tma": _tma, "swap_ab": _swap_ab}
