"""Who computes a product: this library's paths ("stf...") and what they have to beat. A rival is one function here.

It gets the operands and the name of a product, and returns that product as a function of its input. In a chain its
products take the places of the eager ones; a function that is registered for "chain" itself is the whole chain.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import stf_kernels
from stf_kernels.ops import launch, torch_path
from stf_kernels.ops.segments import Stage

from .problems import PRODUCTS, Operands, merge

Product = Callable[[Any], Tensor]


class Provider(NamedTuple):
    """`build` gives each of `stages`; `slow`: by torch.compile; extra_error: of a formula that is not quite ours."""

    build: Callable[[Operands, str], Product]
    stages: tuple[str, ...]
    trains: bool = True
    slow: bool = False
    gpu: bool = False
    extra_error: float = 0.0

    def call(self, operands: Operands, stage: str) -> Callable[[], Tensor]:
        parts = (stage,) if stage in self.stages else PRODUCTS
        products = [(self.build if part in self.stages else eager)(operands, part) for part in parts]
        return lambda: reduce(lambda y, product: product(y), products, operands.inputs[stage])


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, *stages: str, **kinds: Any) -> Callable[[Callable], Callable]:
    def register(build: Callable[[Operands, str], Product]) -> Callable:
        PROVIDERS[name] = Provider(build, stages, **kinds)
        return build

    return register


def of_stage(stage: str, *, slow: bool = False, trains: bool = False, gpu: bool = False) -> dict[str, Provider]:
    """`eager` first. Own paths are no rivals: in a chain they do not stand beside eager products."""
    found = {}
    for name, p in PROVIDERS.items():
        there = stage in p.stages or (stage == "chain" and not name.startswith("stf"))
        if there and p.slow == slow and p.trains >= trains and p.gpu <= gpu:
            found[name] = p
    return found


@provider("eager", "chain", *PRODUCTS)
def eager(operands: Operands, stage: str) -> Product:
    """Plain PyTorch: cat, the copy that merges, F.linear, GELU."""
    return lambda x: operands.eager(stage, x)


@provider("stf", "chain", *PRODUCTS)
def stf(operands: Operands, stage: str, **options: Any) -> Product:
    """The default path: of a chain the module, of a product what the chain runs."""
    if stage == "chain":
        return operands.projector
    (w, b), sizes, x = operands.parameters[stage], operands.sizes, operands.inputs[stage]
    if stage == "concat":
        blocks, geometry = [block[:, 1:] for block in x], Stage("gelu")
    elif stage == "linear_merge":
        blocks, geometry = [x], Stage(merge_out=sizes.merge, grid=(sizes.side, sizes.side))
    else:
        blocks, geometry = ([merge(x, sizes)], Stage("gelu")) if stage == "linear" else ([x], Stage())
    if blocks[0].is_cuda:
        return lambda _: launch.run_stage(blocks, w, b, geometry, **options)[0]
    return lambda _: torch_path.run_stage(blocks, w, b, geometry, False)[0]


@provider("stf-triton", "chain", *PRODUCTS, gpu=True)
def stf_triton(operands: Operands, stage: str) -> Product:
    """The same in Triton throughout: it differs where plain torch was selected."""
    product = stf(operands, stage, forced=True)

    def call(x: Any) -> Tensor:
        with stf_kernels.use_backend("triton"):
            return product(x)

    return call


@provider("stf-merge_in", "linear")
def stf_merge_in(operands: Operands, stage: str) -> Product:
    """spatial_merge_linear: merged on load, by the kernel that also multiplies."""
    w, b = operands.parameters[stage]
    options = {"grid": [operands.sizes.side] * 2, "merge_size": operands.sizes.merge, "activation": "gelu"}
    return lambda x: stf_kernels.spatial_merge_linear(x, w, b, **options)


@provider("strided", "concat")
def strided(operands: Operands, stage: str) -> Product:
    """One cuBLAS operand over a preallocated [B, 577, 8, C] buffer that the tower would fill."""
    w, b = operands.parameters[stage]
    buffer = torch.stack(operands.blocks, dim=2).flatten(2)  # filled before the clock starts
    return lambda _: F.gelu(F.linear(buffer[:, 1:], w, b))


@provider("conv2d", "linear")
def conv2d(operands: Operands, stage: str) -> Product:
    """cuDNN's convolution of window 2, stride 2, on channels_last."""
    sizes, (w, b) = operands.sizes, operands.parameters[stage]

    def call(x: Tensor) -> Tensor:
        # Views alone: W[n, (dy dx c)] lies as a kernel [n, c, dy, dx] in channels_last does, tokens as an image.
        kernel = w.view(w.shape[0], sizes.merge, sizes.merge, sizes.dim).permute(0, 3, 1, 2)
        image = x.transpose(1, 2).unflatten(2, (sizes.side, sizes.side))
        return F.gelu(F.conv2d(image, kernel, b, stride=sizes.merge)).flatten(2).transpose(1, 2)

    return call


@provider("addmm_activation", "concat", "linear", trains=False, extra_error=5e-3)
def addmm_activation(operands: Operands, stage: str) -> Product:
    """cuBLASLt's epilogue; its GELU is tanh on CUDA, an error that is reported and not hidden."""
    w, b = operands.parameters[stage]

    def call(x: Any) -> Tensor:
        a = torch.cat([block[:, 1:] for block in x], -1) if stage == "concat" else merge(x, operands.sizes)
        return torch._addmm_activation(b, a.flatten(0, 1), w.t(), use_gelu=True).unflatten(0, a.shape[:2])

    return call


@provider("compile", "chain", *PRODUCTS, slow=True)
def compiled(operands: Operands, stage: str, **more: Any) -> Product:
    """torch.compile of the eager form, max-autotune without its own CUDA graphs."""
    import torch._inductor

    # One piece or an error, and no limit of recompilations from steps before: a rival must not be eager in disguise.
    torch._dynamo.reset()
    options = {**torch._inductor.list_mode_options("max-autotune-no-cudagraphs"), **more}
    return torch.compile(eager(operands, stage), fullgraph=True, dynamic=False, options=options)


# The same with persistent TMA kernels among what it chooses from.
with_tma = partial(compiled, **{"triton.enable_persistent_tma_matmul": True})
provider("compile-tma", "chain", *PRODUCTS, slow=True)(with_tma)
