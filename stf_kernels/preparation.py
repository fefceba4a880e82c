"""Select the kernels of a module ahead of its first call: it runs once a batch size, on random tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .backend import resolve
from .checks import check_int, check_parameter_dtype
from .configs import listening
from .modules import CompactTokenProjector, MultiBlockTokenFusion, SpatialTokenFusion
from .ops import launch

_HEADS = ("module", "batch", "stage", "dtype", "m", "n", "k", "serves", "us", "torch us", "by")


@dataclass
class Report:
    """entries: one a product, by _HEADS' names; notes: of each module why there are none. str() is the table."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [_HEADS, *([entry[head] for head in _HEADS] for entry in self.entries)] if self.entries else []
        texts = [["" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        return "\n".join(["  ".join(map(str.ljust, row, widths)).rstrip() for row in texts] + self.notes)


def prepare(
    module: nn.Module,
    *,
    batch_sizes: Sequence[int] = (1,),
    dtype: torch.dtype | None = None,
    training: bool = False,
    grid: tuple[int, int] = (24, 24),
) -> Report:
    """Select what a module's first calls would select, before they are made: in a server's start, before a capture.

    Args:
        module: a MultiBlockTokenFusion, SpatialTokenFusion or CompactTokenProjector, or a module that contains some.
        batch_sizes: images of a call.
        dtype: of the tokens; where it is not the parameters' own, the module runs under autocast to it.
        training: the forward that keeps what a backward reads; the backward itself selects nothing.
        grid: (H, W) of an image's tokens before merging; LLaVA-1.5's by default. What was selected serves neighbouring
            numbers of rows, too.

    Returns:
        A report: `entries`, a dict for every product with what serves and the microseconds that decided it, and str()
        as a table. Where Triton does not serve, on a CPU, it says that plain torch computes.

    Raises:
        TypeError, ValueError: an argument of another type or size.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if isinstance(batch_sizes, int):
        raise TypeError(f"batch_sizes: expected a sequence of ints, got {batch_sizes!r}")
    for batch in batch_sizes:
        check_int("batch_sizes", batch, 1)
    check_parameter_dtype(dtype)
    report = Report()
    for name, part in _fused(module):
        like = next((p for p in part.parameters() if p.is_floating_point()), torch.empty(0))
        tokens = dtype or like.dtype
        if resolve(like.device, tokens) == "torch":
            report.notes.append(f"{name}: plain torch serves on {like.device} in {tokens}, nothing is selected")
            continue
        for batch in batch_sizes:
            launch.forget()  # what is ready would not be asked for
            with listening() as heard, torch.autocast(like.device.type, tokens, enabled=tokens != like.dtype):
                _run(part, batch, like.device, tokens, training, grid)
            report.entries += [{"module": name, "batch": batch} | entry for entry in heard]
    if not (report.entries or report.notes):
        report.notes.append(f"{type(module).__name__} contains no module of stf_kernels, nothing is selected")
    return report


def _fused(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of this library, by name."""
    if isinstance(module, CompactTokenProjector | MultiBlockTokenFusion | SpatialTokenFusion):
        yield name or type(module).__name__, module
        return
    for child_name, child in module.named_children():
        yield from _fused(child, f"{name}.{child_name}" if name else child_name)


def _run(
    module: Any, batch: int, device: torch.device, dtype: torch.dtype, training: bool, grid: Sequence[int]
) -> None:
    merging = module if isinstance(module, SpatialTokenFusion) else getattr(module, "stf", None)
    if merging is not None:  # windows that are whole
        grid = [-(-side // merging.merge_size) * merging.merge_size for side in grid]
    shape = batch, getattr(module, "skip_tokens", 0) + math.prod(grid), module.dim
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = draw() if merging is module else [draw() for _ in range(module.num_blocks)]
    with torch.set_grad_enabled(training):
        module(x) if merging is None else module(x, tuple(grid))
