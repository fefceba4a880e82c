"""One stage: y = act(A @ W^T + b), with A and y placed by geometry.

merge_in r    A's rows are r x r windows of the token grid of one block: [B, H*W, C] -> B*(H//r)*(W//r) rows
merge_out r   y's rows are written in the merged layout: B*H*W rows -> [B, (H//r)*(W//r), r*r*N]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)  # itself and no other: the key of a call hashes it every time
class Stage:
    """Geometry and activation of one segmented GEMM. grid is (H, W) before merging, if there is a merge."""

    activation: str | None = None
    merge_in: int = 1
    merge_out: int = 1
    grid: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.merge_out > 1 and (self.merge_in > 1 or self.activation is not None):
            raise ValueError("a stage that merges on store neither merges on load nor has an activation")

    def kind(self, num_blocks: int) -> str:
        """The name under which tuning tables know this stage; a concat of one block is a plain linear layer."""
        if self.merge_in > 1:
            return "merge"
        if self.merge_out > 1:
            return "linear_merge"
        return "concat" if num_blocks > 1 else "linear"

    def tokens(self, shape: Sequence[int]) -> int:
        """GEMM rows per image of blocks of a shape [B, T, C]."""
        return self._windows(self.merge_in) if self.merge_in > 1 else shape[1]

    def out_shape(self, shape: Sequence[int], n: int) -> tuple[int, int, int]:
        if self.merge_out > 1:
            return shape[0], self._windows(self.merge_out), self.merge_out**2 * n
        return shape[0], self.tokens(shape), n

    def _windows(self, size: int) -> int:
        return (self.grid[0] // size) * (self.grid[1] // size)

    def num_segments(self, blocks: Sequence[Tensor]) -> int:
        return len(blocks) * self.merge_in**2

    def segments(self, blocks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each segment's rows as a strided view: [B, tokens, C], or [B, H//r, W//r, C] for a merge."""
        for block in blocks:
            if self.merge_in == 1:
                yield block
                continue
            windows = split_windows(block, self.grid, self.merge_in)
            for dy in range(self.merge_in):
                for dx in range(self.merge_in):
                    yield windows[:, :, dy, :, dx]


def split_windows(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """[B, H*W, C] -> view [B, H//r, r, W//r, r, C]; rows and columns of no window are left out."""
    height, width = grid[0] // size, grid[1] // size
    if grid != (height * size, width * size):
        x = x.unflatten(1, grid)[:, : height * size, : width * size]
    return x.view(x.shape[0], height, size, width, size, x.shape[-1])


def merge_windows(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """[B, H*W, N] -> [B, (H//r)*(W//r), r*r*N], patch-major (one copy)."""
    windows = split_windows(x, grid, size).permute(0, 1, 3, 2, 4, 5)
    shape = (x.shape[0], (grid[0] // size) * (grid[1] // size), size * size * x.shape[2])
    return windows.reshape(shape)


def unmerge_windows(merged: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """The adjoint of `merge_windows`: a bijection, with zeros where a truncated grid has no window."""
    batch, channels = merged.shape[0], merged.shape[2] // size**2
    whole = grid[0] % size == 0 and grid[1] % size == 0
    shape = (batch, grid[0] * grid[1], channels)
    x = merged.new_empty(shape) if whole else merged.new_zeros(shape)
    rows, columns = grid[0] // size, grid[1] // size
    windows = merged.view(batch, rows, columns, size, size, channels).permute(0, 1, 3, 2, 4, 5)
    split_windows(x, grid, size).copy_(windows)
    return x
