"""torch.library registration of an operator that is a chain of stages, and the way around it.

An operator has three tensor arguments and static ones:

    name(blocks, weights, biases, *static, save) -> [y, *saved]

blocks and weights are a Tensor or a list of them, biases an optional Tensor or a list (empty: none). `static` fixes
the geometry. From `plan` alone come the schema's implementation, fake, autograd formula and autocast rule.

Through the dispatcher a call costs tens of microseconds on the host; outside torch.compile and without tensor
subclasses it goes straight to the implementation, or to a plain autograd.Function where a gradient is wanted.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backend import current_backend, use_backend, use_triton
from .backward import Needs, chain_bwd
from .chain import chain_fwd
from .stage import Stage

NAMESPACE = "stf_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


class Plan(NamedTuple):
    """What the static arguments mean: the stages, and how many leading tokens of every block are not read."""

    stages: tuple[Stage, ...]
    skip_tokens: int


def define(name: str, arguments: str, returns: str, function: Callable, fake: Callable):
    """Register one operator with its fake -> the callable torch.ops.stf_kernels.<name>.default."""
    _library.define(f"{name}({arguments}) -> {returns}")
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _as_list(value: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


class Form(NamedTuple):
    """How an argument was passed, without the tensors: None, one tensor, or a list of `count`."""

    count: int
    is_list: bool

    @classmethod
    def of(cls, value: Tensor | Sequence[Tensor] | None) -> "Form":
        return cls(len(_as_list(value)), not (value is None or isinstance(value, Tensor)))

    def restore(self, items: list):
        """`count` items in that form."""
        if self.is_list:
            return items
        return items[0] if self.count else None


def _restore_all(forms: Sequence[Form], items: Sequence) -> list:
    groups = _split(items, [form.count for form in forms])
    return [form.restore(group) for form, group in zip(forms, groups, strict=True)]


class ChainOperator:
    """One operator: call it with (blocks, weights, biases, *static) -> y."""

    def __init__(self, name: str, tensors: str, static: str, plan: Callable[..., Plan]) -> None:
        """tensors and static are their parts of the schema; plan maps the static arguments to a Plan."""
        self._plan = plan
        self._forward_op = define(name, f"{tensors}, {static}, bool save", "Tensor[]", self._forward, self._fake)
        self._backward_op = define(
            f"{name}_bwd", f"Tensor grad, Tensor[] saved, {tensors}, {static}, bool[] needs", "Tensor[]",
            self._backward, self._fake_backward,
        )  # fmt: skip
        qualified = f"{NAMESPACE}::{name}"
        torch.library.register_autograd(
            qualified, self._autograd_backward, setup_context=self._setup_context, lib=_library
        )
        for device in ("CUDA", "CPU"):
            _library.impl(name, self._autocast(device.lower()), f"Autocast{device}")

    def __call__(self, blocks, weights, biases, *static) -> Tensor:
        tensors = [*_as_list(blocks), *_as_list(weights), *_as_list(biases)]
        wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        ordinary = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        if torch.compiler.is_compiling() or not ordinary or _is_watched(tensors[0]):
            return self._forward_op(blocks, weights, biases, *static, wants_grad)[0]
        if wants_grad:
            lengths = len(_as_list(blocks)), len(_as_list(weights))
            return _Eager.apply(self._plan(*static), lengths, *tensors)
        return self._forward(blocks, weights, biases, *static, False)[0]

    def _forward(self, blocks, weights, biases, *static_and_save) -> list[Tensor]:
        *static, save = static_and_save
        y, saved = run_plan(self._plan(*static), _as_list(blocks), _as_list(weights), _as_list(biases), save=save)
        return [y, *saved]

    def _fake(self, blocks, weights, biases, *static_and_save) -> list[Tensor]:
        *static, save = static_and_save
        stages, skip = self._plan(*static)
        block = _as_list(blocks)[0][:, skip:]
        saved = []
        for i, (stage, weight) in enumerate(zip(stages, _as_list(weights), strict=True)):
            rows, n = block.shape[0] * stage.tokens(block.shape), weight.shape[0]
            y = block.new_empty(stage.out_shape(block.shape, n))
            if save and stage.activation is not None:
                saved.append(block.new_empty((rows, n)))
            elif save and i < len(stages) - 1:
                saved.append(y)
            block = y
        return [block, *saved]

    def _setup_context(self, ctx, inputs, output) -> None:
        ctx.forms, ctx.static, ctx.save = [Form.of(value) for value in inputs[:3]], inputs[3:-1], inputs[-1]
        ctx.backend = current_backend()
        ctx.save_for_backward(*output[1:], *(t for value in inputs[:3] for t in _as_list(value)))

    def _autograd_backward(self, ctx, grads):
        _refuse_double_backward()
        if not ctx.save:
            raise RuntimeError("save: a gradient was asked for; call the operator with save=True")
        needs = [
            need for form, flag in zip(ctx.forms, ctx.needs_input_grad, strict=False) for need in _flags(form, flag)
        ]
        kept = list(ctx.saved_tensors)
        saved, tensors = kept[: len(kept) - len(needs)], kept[len(kept) - len(needs) :]
        with use_backend(ctx.backend):
            found = iter(self._backward_op(grads[0], saved, *_restore_all(ctx.forms, tensors), *ctx.static, needs))
        in_order = [next(found) if need else None for need in needs]
        return (*_restore_all(ctx.forms, in_order), *(None for _ in ctx.static), None)

    def _backward(self, grad, saved, blocks, weights, biases, *static_and_needs) -> list[Tensor]:
        *static, needs = static_and_needs
        grads = _run_backward(
            self._plan(*static), grad, list(saved), _as_list(blocks), _as_list(weights), len(_as_list(biases)), needs
        )
        return [g for g, need in zip(grads, needs, strict=True) if need]

    def _fake_backward(self, grad, saved, blocks, weights, biases, *static_and_needs) -> list[Tensor]:
        tensors = [*_as_list(blocks), *_as_list(weights), *_as_list(biases)]
        return [t.new_empty(t.shape) for t, need in zip(tensors, static_and_needs[-1], strict=True) if need]

    def _autocast(self, device_type: str) -> Callable:
        def autocast(blocks, weights, biases, *rest):
            wide = _as_list(blocks)[0].dtype == torch.float64  # float64 stays, as nn.Linear's does
            dtype = torch.float64 if wide else torch.get_autocast_dtype(device_type)
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))
            ):
                cast = [Form.of(v).restore([t.to(dtype) for t in _as_list(v)]) for v in (blocks, weights, biases)]
                return self._forward_op(*cast, *rest)

        return autocast


class _Eager(torch.autograd.Function):
    """The same formulas without the dispatcher: apply(plan, (number of blocks, of weights), *tensors) -> y."""

    @staticmethod
    def forward(ctx, plan: Plan, lengths: tuple[int, int], *tensors: Tensor) -> Tensor:
        blocks, weights, biases = _split(tensors, (*lengths, len(tensors) - sum(lengths)))
        y, saved = run_plan(plan, blocks, weights, biases, save=True)
        ctx.plan, ctx.sizes = plan, (len(blocks), len(weights), len(biases))
        ctx.backend = current_backend()  # the backward runs in a thread of its own, where `use_backend` is not seen
        ctx.save_for_backward(*saved, *tensors)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        _refuse_double_backward()
        kept, count = ctx.saved_tensors, sum(ctx.sizes)
        saved, tensors = list(kept[: len(kept) - count]), kept[len(kept) - count :]
        blocks, weights, biases = _split(tensors, ctx.sizes)
        # Without retain_graph the node lets go of what it saved, and the backward frees it piece by piece.
        ctx.maybe_clear_saved_tensors()
        del kept, tensors
        with use_backend(ctx.backend):
            grads = _run_backward(ctx.plan, grad, saved, blocks, weights, len(biases), ctx.needs_input_grad[2:])
        return (None, None, *grads)


def run_plan(plan: Plan, blocks, weights, biases, *, save: bool, out=None, rows=None) -> tuple[Tensor, list[Tensor]]:
    """Run a chain's forward -> (output, what the backward needs if `save`); biases may be empty."""
    stages, skip = plan
    if skip:
        blocks = [block[:, skip:] for block in blocks]
    return chain_fwd(blocks, weights, biases or [None] * len(weights), stages, save=save, out=out, rows=rows)


def _run_backward(plan: Plan, grad, saved, blocks, weights, num_biases: int, needs) -> list[Tensor | None]:
    """Gradients of [*blocks, *weights, *biases], with zeros for the skipped tokens; None where not needed."""
    stages, skip = plan
    for_blocks, for_weights, for_biases = _split(needs, (len(blocks), len(weights), num_biases))
    needed = Needs(for_blocks, for_weights, for_biases or [False] * len(weights))
    cropped = [block[:, skip:] for block in blocks]
    # A backward called inside an autocast region must not have its products cast: they are in the forward's dtype.
    with torch.autocast(grad.device.type, enabled=False):
        d_blocks, d_weights, d_biases = chain_bwd(grad, saved, cropped, weights, stages, needed)
    if skip:
        d_blocks = [g if g is None else nn.functional.pad(g, (0, 0, skip, 0)) for g in d_blocks]
    return [*d_blocks, *d_weights, *d_biases[:num_biases]]


def _split(items: Sequence, sizes: Sequence[int]) -> list[list]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(items[start : start + size]))
        start += size
    return parts


def _flags(form: Form, flag: bool | Sequence[bool]) -> list[bool]:
    """ctx.needs_input_grad of one argument, a flag for each of its tensors."""
    return list(flag) if form.is_list else [flag] * form.count


def _is_watched(x: Tensor) -> bool:
    """A kernel would run where a mode records (FLOP counters, make_fx) what goes through the dispatcher.

    Forward-mode derivatives would be lost in a kernel, so they are refused there; plain torch has both by itself.
    """
    recorded, dual = torch._C._len_torch_dispatch_stack() > 0, forward_ad._current_level >= 0
    if not (recorded or dual) or not use_triton(x.device, x.dtype):
        return False
    if dual:
        raise RuntimeError(
            "stf_kernels: forward-mode derivatives are not supported by the Triton kernels; use use_backend('torch')"
        )
    return True


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "stf_kernels: double backward (create_graph=True) is not supported; "
            "compute higher derivatives with the modules of `reference`"
        )
