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


def is_refusal(config: GemmConfig, error: Exception) -> bool:
    """An error of the operands, which a configuration's descriptors do not suit; the driver has words of its own."""
    named = "tensor map" in str(error) or "invalid argument" in str(error)
    return isinstance(error, Refused) or (config.form != "pointer" and named)


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

    def blocks(self, c: int, box: Sequence[int]):
        """x[offset, image, row, column] in boxes."""
        strides = self.unit // self.base.element_size(), self.pitch_image, self.pitch_row
        return descriptor(self.base, (self.offsets, self.images, self.image_rows, c), strides, box)

    def box_rows(self, block_m: int) -> int:
        """The whole tile where rows have one pitch and TMA takes the box; else boxes that stay within an image."""
        return block_m if self.images == 1 and block_m & (block_m - 1) == 0 else _BOX_ROWS


def layout_of(blocks: Sequence[Tensor], weight: Tensor, stage: Stage, config: GemmConfig) -> Layout:
    """The layout that a configuration with descriptors needs; Refused where the operands do not have it."""
    x = blocks[0]
    batch, tokens, c = x.shape
    first = 1 if batch == 1 else 0  # one image has no stride between images
    alike = all(block.stride()[first:] == x.stride()[first:] for block in blocks)
    pitch_image, pitch_row = x.stride(0), x.stride(1)
    if batch == 1 or pitch_image == tokens * pitch_row:
        batch, tokens, pitch_image = 1, batch * tokens, batch * tokens * pitch_row
    base = min(blocks, key=Tensor.data_ptr)
    ahead = [block.data_ptr() - base.data_ptr() for block in blocks]
    unit = math.gcd(LARGEST_UNIT, *ahead)  # a power of two, as LARGEST_UNIT is
    pitches = [pitch * x.element_size() for pitch in (pitch_image, pitch_row, weight.stride(0))]
    aligned = not any(a % _ALIGNMENT for a in (base.data_ptr(), weight.data_ptr(), unit, *pitches))
    near = max(ahead) < 2**31  # bytes: Triton counts the span of a descriptor in an int
    layout = Layout(base, unit, max(ahead) // unit + 1, batch, tokens, pitch_image, pitch_row)
    if config.form == "swap_ab":
        fits = batch == 1 and len(blocks) == 1
    else:
        fits = (batch == 1 or tokens % _BOX_ROWS == 0) and c % config.block_k == 0
    named = device_has_tma(x.device) and stage.merge_in == 1 and alike and aligned and near
    if not (named and fits and c and min(pitches) > 0):
        raise Refused(f"no descriptor names these operands of {config}")
    return layout


@functools.cache
def device_has_tma(device: torch.device) -> bool:
    """A GPU that has it; the interpreter pretends, and nothing runs on the meta device."""
    if device.type != "cuda":
        return interpreting() or device.type == "meta"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def descriptor(base: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]):
    """A strided array from a tensor's address on, in boxes; its last axis is contiguous and has no stride here."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base, list(shape), [*strides, 1], list(box))
