"""The kernels that can run a stage, and what each is launched with.

pointers     kernels/segmented_linear.py, or kernels/split_k.py where K is split: any operands, any GPU
descriptors  kernels/descriptor.py: operands that TMA can name (descriptors.py)
swapped      kernels/swapped.py: one dense operand that TMA can name
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tuning import GemmConfig
from .descriptors import Layout, block_descriptor, layout_for, row_descriptor, weight_descriptor
from .direct_launch import launch
from .pdl import pdl_options
from .stage import Stage
from .workspace import arrival_counters, partial_sums

HALF = (torch.float16, torch.bfloat16)


class DescriptorRefused(RuntimeError):
    """The operands have no tensor descriptor, or the driver does not take it."""


_warned: set[tuple[str, bool]] = set()


@dataclass(slots=True)
class Call:
    """The operands of one launch: blocks [B, T, C] and weight [N, K] with contiguous last axes, y and pre allocated.

    The GEMM has m rows, `tokens` of them an image.
    """

    blocks: Sequence[Tensor]
    weight: Tensor
    bias: Tensor | None
    y: Tensor
    pre: Tensor | None
    rows: Tensor | None
    stage: Stage
    m: int
    tokens: int
    y_stride: int
    scatter_rows: bool

    def launch(self, config: GemmConfig, *, strict: bool = False) -> None:
        """Run the kernel that `config` names, or the portable one where the operands do not suit it.

        strict raises DescriptorRefused instead: who measures a kernel wants that one or none.
        """
        if config.form == "pointers":
            self._by_pointers(config)
            return
        layout = layout_for(self.blocks, self.weight, self.stage, config)
        refusal = None if layout is not None else "no descriptor names these operands"
        if layout is not None:
            run = self._by_descriptors if config.form == "descriptors" else self._swapped
            try:
                run(config, layout)
            except RuntimeError as error:
                if "tensor map" not in str(error) and "invalid argument" not in str(error):
                    raise
                refusal = f"the driver refuses the descriptor: {error}"
        if refusal is None:
            return
        if strict:
            raise DescriptorRefused(refusal)
        if layout is not None:
            self._warn(layout, refusal)
        self._by_pointers(config.portable())

    def _warn(self, layout: Layout, refusal: str) -> None:
        """Once for dense and once for cropped operands: it is their descriptors that differ."""
        if (self.weight.device.type, layout.dense) not in _warned:
            _warned.add((self.weight.device.type, layout.dense))
            warnings.warn(f"stf_kernels: {refusal}; the portable kernel serves instead", stacklevel=2)

    def _by_pointers(self, config: GemmConfig) -> None:
        from ..kernels.segmented_linear import _segmented_linear_fwd_kernel
        from ..kernels.split_k import _segmented_linear_split_k_fwd_kernel

        strides = [block.stride()[:2] for block in self.blocks]
        uniform = all(stride == strides[0] for stride in strides)
        if uniform:
            strides = strides[:1]
        pointers = (tuple(self.blocks), self.weight, *self._targets)
        sizes = (
            *self._sizes, tuple(stride[0] for stride in strides), tuple(stride[1] for stride in strides),
            self.weight.stride(0), self.y_stride, self.y.shape[0],
        )  # fmt: skip
        constants = self._constants(config, uniform_strides=uniform)
        if config.split_k == 1:
            self._start(_segmented_linear_fwd_kernel, config, pointers + sizes, constants)
        else:
            pointers += self._shared(config, config.block_m * config.block_n)
            self._start(_segmented_linear_split_k_fwd_kernel, config, pointers + sizes, constants)

    def _by_descriptors(self, config: GemmConfig, layout: Layout) -> None:
        from ..kernels.descriptor import _segmented_linear_descriptor_fwd_kernel

        box_rows = layout.box_rows(config.block_m)
        arguments = (
            block_descriptor(layout, self.blocks[0].shape[-1], box_rows, config.block_k),
            weight_descriptor(self.weight, config.block_n, config.block_k), layout.base, tuple(self.blocks),
            *self._targets, *self._sizes, layout.image_rows, self.y_stride, self.y.shape[0],
        )  # fmt: skip
        constants = self._constants(config, unit=layout.unit, box_rows=box_rows)
        self._start(_segmented_linear_descriptor_fwd_kernel, config, arguments, constants)

    def _swapped(self, config: GemmConfig, layout: Layout) -> None:
        from ..kernels.swapped import _swapped_linear_fwd_kernel

        c = self.blocks[0].shape[-1]
        shared = self._shared(config, 2 * config.block_m * config.block_n) if config.split_k > 1 else (None, None)
        arguments = (
            row_descriptor(layout, c, config.block_m, config.block_k),
            row_descriptor(layout, c, config.tail_m, config.block_k),
            weight_descriptor(self.weight, config.block_n, config.block_k),
            *self._targets, *shared, *self._sizes, self.y_stride, self.y.shape[0],
        )  # fmt: skip
        self._start(_swapped_linear_fwd_kernel, config, arguments, self._constants(config))

    @property
    def _targets(self) -> tuple:
        return self.bias, self.y, self.pre, self.rows

    @property
    def _sizes(self) -> tuple[int, ...]:
        """M, N, tokens, grid_w, grid_h of every kernel."""
        return self.m, self.weight.shape[0], self.tokens, self.stage.grid[1], self.stage.grid[0]

    def _tiles(self, config: GemmConfig) -> int:
        return -(-self.m // config.rows) * -(-self.weight.shape[0] // config.block_n)

    def _shared(self, config: GemmConfig, tile_elements: int) -> tuple[Tensor, Tensor]:
        """Split K's workspace and counters."""
        tiles, device = self._tiles(config), self.weight.device
        return partial_sums(tiles, config.split_k, tile_elements, device), arrival_counters(tiles, device)

    def _constants(self, config: GemmConfig, **of_form) -> dict[str, object]:
        return stage_constants(
            self.stage, len(self.blocks), self.blocks[0].shape[-1], self.blocks[0].dtype, config,
            has_bias=self.bias is not None, save_pre=self.pre is not None, scatter_rows=self.scatter_rows, **of_form,
        )  # fmt: skip

    def _start(self, kernel, config: GemmConfig, arguments: tuple, constants: dict[str, object]) -> None:
        options = pdl_options(self.weight.device)
        constants["PDL"] = bool(options)
        grid = (self._tiles(config),) if config.split_k == 1 else (self._tiles(config), config.split_k)
        launch(kernel, grid, arguments, constants, num_warps=config.num_warps, num_stages=config.num_stages, **options)


def stage_constants(
    stage: Stage, num_blocks: int, c: int, dtype: torch.dtype, config: GemmConfig, *, has_bias: bool, save_pre: bool,
    scatter_rows: bool, uniform_strides: bool = True, unit: int = 0, box_rows: int = 0,
) -> dict[str, object]:  # fmt: skip
    """The constexpr parameters of the configuration's kernel: what a compiled specialisation is made for."""
    constants: dict[str, object] = {}
    if config.form != "swapped":
        constants["NUM_BLOCKS"] = num_blocks
    constants["C"] = c
    if config.form == "pointers":
        constants |= {"GATHER": stage.gather, "UNIFORM_STRIDES": uniform_strides}
    elif config.form == "descriptors":
        constants |= {"UNIT": unit, "BOX_M": box_rows}
    else:
        constants["TAIL_M"] = config.tail_m
    if config.form == "swapped" or config.split_k > 1:
        constants["SPLIT_K"] = config.split_k
    return constants | {
        "STORE": "scatter" if scatter_rows else "merge" if stage.scatter > 1 else "rows",
        "MERGE": stage.scatter,
        "ACTIVATION": stage.activation or "none",
        "FAST_ACTIVATION": dtype in HALF,
        "HAS_BIAS": has_bias,
        "SAVE_PRE": save_pre,
        "INPUT_PRECISION": input_precision(),
        "PDL": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


def input_precision() -> str:
    """fp32 operands as torch multiplies them: IEEE unless torch.backends.cuda.matmul allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
