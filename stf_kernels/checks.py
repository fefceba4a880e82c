"""Validation of arguments: every message names the argument, what was expected and what came."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu")
FEATURE_ORDERS = ("patch_major", "channel_major")
ORDINARY = frozenset((Tensor, torch.nn.Parameter))  # no subclass, which may have operators of its own
_SEQUENCES = (list, tuple, Sequence)  # the first two first: to ask an abstract class is slow
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_BLOCKS = 32


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and minimum <= value and (maximum is None or value <= maximum):
        return
    bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise (ValueError if is_int else TypeError)(f"{name}: expected an int {bounds}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Anything is true or false; "False" is true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_parameter_dtype(dtype: object) -> None:
    """Of parameters to be made; None is torch's default."""
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype!r}")


def check_tokens(name: str, x: object, dim: int | None = None) -> None:
    """A batch of token features: floating [B, T, C], C as given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [B, T, C], got {type(x).__name__}")
    if x.ndim != 3:
        raise ValueError(f"{name}: expected shape [B, T, C], got {tuple(x.shape)}")
    refuse_dtensor(name, x)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a dtype of float16, bfloat16, float32 or float64, got {x.dtype}")
    if dim is not None and x.shape[2] != dim:
        raise ValueError(f"{name}: expected {dim} channels (dim), got shape {tuple(x.shape)}")


def check_blocks(blocks: object, num_blocks: int | None = None) -> None:
    """M tensors of one shape, dtype and device; M as given, else 1 to 32."""
    if not isinstance(blocks, _SEQUENCES):
        raise TypeError(f"blocks: expected a list or tuple of tensors [B, T, C], got {type(blocks).__name__}")
    if not blocks:
        raise ValueError("blocks: expected at least one tensor [B, T, C], got none")
    if num_blocks is not None and len(blocks) != num_blocks:
        raise ValueError(f"blocks: expected {num_blocks} tensors (num_blocks), got {len(blocks)}")
    if len(blocks) > MAX_BLOCKS:
        raise ValueError(f"blocks: expected at most {MAX_BLOCKS} tensors, got {len(blocks)}")
    check_tokens("blocks[0]", blocks[0])
    shape, dtype, device = blocks[0].shape, blocks[0].dtype, blocks[0].device
    for i, block in enumerate(blocks):
        if type(block) in ORDINARY and block.shape == shape and block.dtype is dtype and block.device == device:
            continue
        check_tokens(f"blocks[{i}]", block)
        check_same(f"blocks[{i}]", block, "blocks[0]", blocks[0])
        if block.shape != blocks[0].shape:
            raise ValueError(
                f"blocks[{i}]: expected the shape of blocks[0] {tuple(blocks[0].shape)}, got {tuple(block.shape)}"
            )


def check_module_blocks(blocks: Sequence[Tensor], num_blocks: int, dim: int, skip_tokens: int) -> None:
    check_blocks(blocks, num_blocks)
    if blocks[0].shape[2] != dim:
        check_tokens("blocks[0]", blocks[0], dim)
    check_skip(skip_tokens, blocks[0].shape[1])


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name} {other.dtype}, got dtype {tensor.dtype}")
    if tensor.device != other.device:
        where = " (load the module's weights, or `to_empty` it, before use)" if tensor.device.type == "meta" else ""
        raise ValueError(
            f"{name}: expected the device of {other_name} {other.device}, got device {tensor.device}{where}"
        )


def refuse_dtensor(name: str, tensor: object) -> None:
    if type(tensor).__name__ == "DTensor":  # by name: importing torch.distributed.tensor costs what few need
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor, which these kernels do not shard over; apply fully_shard "
            "to the projector or its children (they gather their parameters before forward), or pass full_tensor()"
        )


def check_linear(weight: object, bias: Any, k: int, k_meaning: str, x_name: str, x: Tensor, layer: str = "") -> None:
    """weight [N, k] and bias [N] that fit x's dtype and device; `layer` ("stf.linear_2.") says whose they are."""
    if _is_linear(weight, bias, k, x.dtype, x.device):
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{layer}weight: expected a tensor [N, {k}], got {type(weight).__name__}")
    if weight.ndim != 2 or weight.shape[1] != k:
        raise ValueError(f"{layer}weight: expected shape [N, {k}] ({k_meaning}), got {tuple(weight.shape)}")
    refuse_dtensor(f"{layer}weight", weight)
    check_same(f"{layer}weight", weight, x_name, x)
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{layer}bias: expected a tensor [{weight.shape[0]}] or None, got {type(bias).__name__}")
    refuse_dtensor(f"{layer}bias", bias)
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{layer}bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_same(f"{layer}bias", bias, x_name, x)


def _is_linear(weight: Any, bias: Any, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Ordinary operands in which check_linear finds nothing: the usual call, in a third of the time."""
    if type(weight) not in ORDINARY or weight.dtype is not dtype or weight.device != device or weight.ndim != 2:
        return False
    n, width = weight.shape
    if width != k or bias is None:
        return width == k
    return type(bias) in ORDINARY and bias.dtype is dtype and bias.device == device and bias.shape == (n,)


def check_skip(skip_tokens: Any, tokens: int) -> None:
    check_int("skip_tokens", skip_tokens, 0)
    if skip_tokens > tokens:
        raise ValueError(f"skip_tokens: expected at most the {tokens} tokens of the input, got {skip_tokens}")


def resolve_grid(grid: Sequence[int] | None, tokens: int, merge_size: int, truncate: bool) -> tuple[int, int]:
    """(H, W) of `tokens` tokens, checked against the merge size; None means a square."""
    check_bool("truncate", truncate)
    if grid is None:
        side = math.isqrt(len(range(tokens)))  # a plain int, of what torch.compile may trace as a symbol
        if side * side != tokens:
            raise ValueError(f"grid: {tokens} tokens are not a square; pass grid=(H, W)")
        grid = (side, side)
    if not isinstance(grid, _SEQUENCES) or isinstance(grid, str) or len(grid) != 2:
        raise TypeError(f"grid: expected (H, W), got {grid!r}")
    for side, name in zip(grid, ("H", "W"), strict=True):
        check_int(f"grid {name}", side, 1)
    height, width = grid
    if height * width != tokens:
        raise ValueError(f"grid: expected H * W = {tokens} tokens, got {(height, width)} = {height * width}")
    if (height % merge_size or width % merge_size) and not truncate:
        raise ValueError(
            f"grid: {(height, width)} is not divisible by merge_size={merge_size}; "
            "pass truncate=True to drop the last rows and columns"
        )
    return height, width


def _rows_apart(out: Tensor) -> bool:
    return (out.stride(1) == 1 or out.shape[1] == 1) and (out.stride(0) >= out.shape[1] or out.shape[0] <= 1)


def check_out(out: object, rows: object, count: int, width: int, x: Tensor) -> None:
    """The target of an indexed result: out [R, width] of x's dtype and device, rows int64 [count] inside it."""
    if out is None or rows is None:
        raise ValueError(f"{'out' if out is None else 'rows'}: out and rows come together, got only the other")
    for name, tensor in (("out", out), ("rows", rows)):
        refuse_dtensor(name, tensor)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] != width or not _rows_apart(out):
        got = f"{tuple(out.shape)} with strides {out.stride()}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"out: expected a tensor [R, {width}] with a contiguous last axis and rows that do not overlap, got {got}"
        )
    check_same("out", out, "blocks[0]", x)
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or tuple(rows.shape) != (count,):
        got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"rows: expected int64 [{count}], one row of out per token, got {got}")
    if rows.device != x.device:
        raise ValueError(f"rows: expected the device of blocks[0] {x.device}, got device {rows.device}")
    # Reading the values of a GPU tensor would synchronise; see CompactTokenProjector.forward.
    if rows.device.type == "cpu" and count and not torch.compiler.is_compiling():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= out.shape[0]:
            raise ValueError(f"rows: expected values from 0 to {out.shape[0] - 1}, got {low} to {high}")
