"""When the operands of a stage can be named to the tensor memory accelerator, and the descriptors that do.

All blocks share one descriptor: from the lowest address on, each lies a multiple of UNIT bytes ahead. The largest
such power of two is taken, up to 512, which is how PyTorch's allocator aligns.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import interpreting
from ..configs import GemmConfig
from .segments import Stage

_ALIGNMENT = 16  # bytes: of addresses and pitches, by the hardware
LARGEST_UNIT = 512
_BOX_ROWS = 64  # 576 rows of an image are nine boxes: none crosses into the next image


class Refused(RuntimeError):
    """The operands have no tensor descriptor, or the driver does not take it."""


@dataclass(frozen=True)
class Layout:
    """How the rows of A lie: unit and base of the shared descriptor, images, rows of each, pitches in elements."""

    base: Tensor
    unit: int  # bytes between neighbouring offsets
    offsets: int  # size of that axis
    images: int
    image_rows: int
    pitch_image: int
    pitch_row: int

    @property
    def dense(self) -> bool:
        return self.images == 1

    def box_rows(self, block_m: int) -> int:
        """The whole tile where rows have one pitch and TMA takes the box; else boxes that stay within an image."""
        return block_m if self.dense and block_m & (block_m - 1) == 0 else _BOX_ROWS


def layout_of(blocks: Sequence[Tensor], weight: Tensor, stage: Stage, config: GemmConfig) -> Layout:
    """The layout that a configuration with descriptors needs; Refused where the operands do not have it.

    blocks: [B, T, C] each, weight [N, K], last axes contiguous.
    """
    layout = _layout(blocks, weight, stage, config)
    if layout is None:
        raise Refused(f"no descriptor names these operands of {config}")
    return layout


def _layout(blocks: Sequence[Tensor], weight: Tensor, stage: Stage, config: GemmConfig) -> Layout | None:
    x = blocks[0]
    if stage.merge_in > 1 or not (interpreting() or is_hopper_or_later(x.device)):
        return None
    batch, tokens, c = x.shape
    of_use = slice(1 if batch == 1 else 0, None)  # one image has no stride between images
    if any(block.stride()[of_use] != x.stride()[of_use] for block in blocks):
        return None
    pitch_image, pitch_row = x.stride(0), x.stride(1)
    if batch == 1 or pitch_image == tokens * pitch_row:
        batch, tokens, pitch_image = 1, batch * tokens, batch * tokens * pitch_row
    itemsize = x.element_size()
    base = min(blocks, key=Tensor.data_ptr)
    ahead = [block.data_ptr() - base.data_ptr() for block in blocks]
    unit = math.gcd(LARGEST_UNIT, *ahead)  # a power of two, as LARGEST_UNIT is
    pitches = [pitch * itemsize for pitch in (pitch_image, pitch_row, weight.stride(0))]
    multiples = [base.data_ptr(), weight.data_ptr(), unit, *pitches]
    far = max(ahead) >= 2**31  # bytes: Triton counts the span of a descriptor in an int
    if any(a % _ALIGNMENT for a in multiples) or min(pitches) <= 0 or far:
        return None
    layout = Layout(base, unit, max(ahead) // unit + 1, batch, tokens, pitch_image, pitch_row)
    if config.form == "swap_ab":
        return layout if layout.dense and len(blocks) == 1 and c > 0 else None
    whole_boxes = layout.dense or tokens % _BOX_ROWS == 0
    return layout if whole_boxes and c > 0 and c % config.block_k == 0 else None


@functools.cache
def is_hopper_or_later(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def block_descriptor(layout: Layout, c: int, box_rows: int, block_k: int):
    """x[offset, image, row, column] in boxes of [1, 1, box_rows, block_k]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    unit = layout.unit // layout.base.element_size()
    return TensorDescriptor(
        layout.base,
        [layout.offsets, layout.images, layout.image_rows, c],
        [unit, layout.pitch_image, layout.pitch_row, 1],
        [1, 1, box_rows, block_k],
    )


def row_descriptor(layout: Layout, c: int, box_rows: int, block_k: int):
    """The rows [M, C] of a dense operand in boxes of [box_rows, block_k]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(layout.base, [layout.image_rows, c], [layout.pitch_row, 1], [box_rows, block_k])


def weight_descriptor(weight: Tensor, block_n: int, block_k: int):
    """weight [N, K] in boxes of [block_n, block_k]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(weight, list(weight.shape), [weight.stride(0), 1], [block_n, block_k])
