"""An operator that is a chain of stages: its torch.library registration, and the way around it.

    name(blocks, weights, biases, activation, skip_tokens, merge_size, grid_h, grid_w, needs) -> [y, *saved]

blocks, weights and biases are lists of tensors (no biases: none), the next five fix the stages. `needs` says of each
tensor in that order whether its gradient will be asked for; empty is none.

The dispatcher costs tens of microseconds: outside torch.compile and without tensor subclasses a call goes past it.
Under torch.func's transforms and forward-mode differentiation plain torch computes.
"""

import functools
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backend import resolve
from ..checks import ORDINARY
from .backward import Needs, chain_bwd, shapes_of
from .chain import Plan, chain_fwd, without_autocast
from .torch_path import is_transformed

# The package's name, so that a copy under another name (from the kernels hub) can live in a process beside this one.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".ops.")[0])
TENSORS = "Tensor[] blocks, Tensor[] weights, Tensor[] biases"
KEPT = "Tensor?[] saved, Tensor?[] blocks, Tensor?[] weights, SymInt[] block, SymInt[] widths"
STATIC = "str? activation, int skip_tokens, int merge_size, int grid_h, int grid_w"
MOST_PLANS = 256  # that an operator remembers: every grid has its own
_library = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, arguments: str, returns: str, function: Callable, fake: Callable):
    """Register one operator with its fake -> the callable torch.ops.<NAMESPACE>.<name>.default."""
    _library.define(f"{name}({arguments}) -> {returns}")
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class ChainOperator:
    """One operator: (blocks, weights, biases, *static) -> y. plan maps the static arguments to a Plan."""

    def __init__(self, name: str, plan: Callable[..., Plan]) -> None:
        self.plan = functools.lru_cache(MOST_PLANS)(plan)
        self._kept = functools.lru_cache(MOST_PLANS)(self._what_is_kept)  # the same in every step of a training
        self._traced_plan = plan  # torch.compile does not see through a cache
        self._forward_op = define(name, f"{TENSORS}, {STATIC}, bool[] needs", "Tensor[]", self._forward, self._fake)
        arguments = f"Tensor grad, {KEPT}, {STATIC}, bool[] needs"
        self._backward_op = define(f"{name}_bwd", arguments, "Tensor[]", self._backward, self._fake_backward)
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", self._autograd_backward, setup_context=self._setup_context, lib=_library
        )

    def __call__(self, blocks: list[Tensor], weights: list[Tensor], biases: list[Tensor], *static) -> Tensor:
        tensors = [*blocks, *weights, *biases]
        needs = [tensor.requires_grad for tensor in tensors] if torch.is_grad_enabled() else []
        if True not in needs:
            needs = []
        if is_transformed() and is_ordinary(tensors):
            plan = self._traced_plan(*static)
            return chain_fwd(plan, "torch", blocks, weights, biases, keep=[True] * 2 * len(weights))[0]
        if torch.compiler.is_compiling() or not is_ordinary(tensors) or is_recorded(blocks[0]):
            return self._forward_op(blocks, weights, biases, *static, needs)[0]
        plan, path = self.plan(*static), resolve(blocks[0].device, blocks[0].dtype)
        if needs:
            lengths = len(blocks), len(weights), len(biases)
            return _Eager.apply(plan, path, lengths, self._kept(static, *lengths[:2], tuple(needs)), *tensors)
        return chain_fwd(plan, path, blocks, weights, biases)[0]

    def _what_is_kept(self, static: tuple, num_blocks: int, num_weights: int, needs: tuple) -> tuple[list[bool], ...]:
        """For a backward: of the stages (Needs.keeps), and of [*blocks, *weights]."""
        found = Needs.of(needs, num_blocks, num_weights)
        return found.keeps(self.plan(*static).stages), found.reads()

    def _forward(self, blocks, weights, biases, *static_and_needs) -> list[Tensor]:
        *static, needs = static_and_needs
        x, (keep, _) = blocks[0], self._kept(tuple(static), len(blocks), len(weights), tuple(needs))
        with without_autocast(x.device.type):
            y, saved = chain_fwd(self.plan(*static), resolve(x.device, x.dtype), blocks, weights, biases, keep=keep)
        return [y, *(tensor for tensor in saved if tensor is not None)]

    def _fake(self, blocks, weights, biases, *static_and_needs) -> list[Tensor]:
        *static, needs = static_and_needs
        (stages, skip), saved = self.plan(*static), []
        keep, _ = self._kept(tuple(static), len(blocks), len(weights), tuple(needs))
        block = blocks[0][:, skip:]
        for stage, weight, pre, out in zip(stages, weights, keep[::2], keep[1::2], strict=True):
            rows, n = block.shape[0] * stage.tokens(block.shape), weight.shape[0]
            block, saved_pre = block.new_empty(stage.out_shape(block.shape, n)), [block.new_empty((rows, n))] * pre
            saved += [*saved_pre, *[block] * out]
        return [block, *saved]

    def _setup_context(self, ctx, inputs, output) -> None:
        blocks, weights, biases, *static, needs = inputs
        ctx.static, ctx.kept_for = static, needs
        ctx.sizes = blocks[0].shape, [weight.shape[0] for weight in weights]
        ctx.lengths = len(blocks), len(weights), len(biases)
        keep, reads = self._kept(tuple(static), *ctx.lengths[:2], tuple(needs))
        saved = iter(output[1:])
        ctx.save_for_backward(*[next(saved) if kept else None for kept in keep], *_read([*blocks, *weights], reads))

    def _autograd_backward(self, ctx, grads):
        _refuse_unsupported(grads[0])
        wanted = [flag for group in ctx.needs_input_grad[:3] for flag in (group or ())]
        kept_for = ctx.kept_for or [False] * len(wanted)
        if missing := [i for i, want in enumerate(wanted) if want and not kept_for[i]]:
            raise RuntimeError(
                f"needs: the gradient of tensor {missing[0]} is wanted, and the forward was told {list(ctx.kept_for)}; "
                "pass the operator a flag for every tensor, true where a gradient will be wanted"
            )
        kept = _split(ctx.saved_tensors, (2 * ctx.lengths[1], *ctx.lengths))[:3]
        found = iter(self._backward_op(grads[0], *kept, *ctx.sizes, *ctx.static, wanted))
        in_order = [next(found) if want else None for want in wanted]
        return (*_split(in_order, ctx.lengths), *(None for _ in ctx.static), None)

    def _backward(self, grad, saved, blocks, weights, block, widths, *static_and_needs) -> list[Tensor]:
        *static, needs = static_and_needs
        grads = chain_bwd(self.plan(*static), grad, list(saved), blocks, weights, block, widths, needs)
        return [g for g, need in zip(grads, needs, strict=False) if need]

    def _fake_backward(self, grad, saved, blocks, weights, block, widths, *static_and_needs) -> list[Tensor]:
        *static, needs = static_and_needs
        _, of_weights = shapes_of(self.plan(*static).stages, len(blocks), block, widths)
        shapes = [*[block] * len(blocks), *of_weights, *[(n,) for n in widths]]
        return [grad.new_empty(shape) for shape, need in zip(shapes, needs, strict=False) if need]


class _Eager(torch.autograd.Function):
    """The same without the dispatcher: apply(plan, path, lengths, kept, *tensors) -> y.

    lengths: how many of the tensors are blocks, weights, biases. kept: `_what_is_kept` of the gradients wanted.
    """

    @staticmethod
    def forward(ctx, plan: Plan, path: str, lengths: tuple[int, int, int], kept: tuple, *tensors: Tensor) -> Tensor:
        blocks, weights, biases = _split(tensors, lengths)
        y, saved = chain_fwd(plan, path, blocks, weights, biases, keep=kept[0])
        ctx.plan, ctx.lengths = plan, lengths
        ctx.sizes = blocks[0].shape, [weight.shape[0] for weight in weights]  # a backward is given what it reads alone
        ctx.save_for_backward(*saved, *_read(tensors, kept[1]))
        return _no_view(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _refuse_unsupported(grad)
        saved, blocks, weights = _split(ctx.saved_tensors, (2 * ctx.lengths[1], *ctx.lengths))[:3]
        # Without retain_graph the node lets go of what it saved, and the backward frees it piece by piece.
        ctx.maybe_clear_saved_tensors()
        needs = ctx.needs_input_grad[4:]
        block, widths = ctx.sizes
        grads = chain_bwd(ctx.plan, grad, saved, blocks, weights, block, widths, needs)
        return None, None, None, None, *grads[: len(needs)]


def _no_view(y: Tensor) -> Tensor:
    """y, which the caller may change in place: autograd forbids that of a view that was made without it."""
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


def _read(tensors: Sequence[Tensor], flags: Sequence[bool]) -> list[Tensor | None]:
    return [tensor if flag else None for tensor, flag in zip(tensors, flags, strict=False)]


def _split(items: Sequence, sizes: Sequence[int]) -> list[list]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(items[start : start + size]))
        start += size
    return parts


def is_ordinary(tensors: Sequence[Tensor]) -> bool:
    """No subclass, which may have operators of its own."""
    return ORDINARY.issuperset(map(type, tensors))


def is_recorded(x: Tensor) -> bool:
    """A kernel would run where a mode records (FLOP counters, make_fx) what goes through the dispatcher."""
    return torch._C._len_torch_dispatch_stack() > 0 and resolve(x.device, x.dtype) != "torch"


def _refuse_unsupported(grad: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "stf_kernels: double backward (create_graph=True) is not supported; for higher derivatives use "
            "torch.func (torch.func.hessian, or grad of grad), which computes in plain torch"
        )
    # by name: of the two kinds of batched tensors torch has an enumerator for one
    if not torch.compiler.is_compiling() and "Batched" in repr(torch._C._dispatch_keys(grad)):
        raise RuntimeError(
            "stf_kernels: a batch of gradients (is_grads_batched=True, vectorize=True, vmap of autograd.grad) is not "
            "supported; torch.func.jacrev is, and so is one gradient at a time"
        )
