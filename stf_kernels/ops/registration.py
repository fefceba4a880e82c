"""torch.library registration of an operator that is a chain of stages, and the way around it.

An operator has three tensor arguments and static ones:

    name(blocks, weights, biases, *static, needs) -> [y, *saved]

blocks and weights are a Tensor or a list of them, biases an optional Tensor or a list (empty: none). `static` fixes
the geometry. `needs` says of each tensor in that order whether its gradient will be asked for; empty is none. From
`plan` alone come the schema's implementation, fake, autograd formula and autocast rule.

Through the dispatcher a call costs tens of microseconds on the host; outside torch.compile and without tensor
subclasses it goes straight to the implementation, or to a plain autograd.Function where a gradient is wanted. Under
torch.func's transforms and forward-mode differentiation plain torch computes (composite.py), inside torch.compile too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backend import current_backend, use_backend, use_triton
from .backward import Needs, Sizes, chain_bwd
from .chain import chain_fwd
from .composite import composite
from .stage import Stage
from .workspace import fresh_counters

NAMESPACE = "stf_kernels"
_ORDINARY = frozenset((Tensor, nn.Parameter))
_library = torch.library.Library(NAMESPACE, "DEF")


class Plan(NamedTuple):
    """What the static arguments mean: the stages, and how many leading tokens of every block are not read."""

    stages: tuple[Stage, ...]
    skip_tokens: int


def define(name: str, arguments: str, returns: str, function: Callable, fake: Callable):
    """Register one operator with its fake -> the callable torch.ops.stf_kernels.<name>.default."""

    def implementation(*operands):
        with fresh_counters():  # a compiled program may run in a memory pool of its own
            return function(*operands)

    _library.define(f"{name}({arguments}) -> {returns}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
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
        self.plan = functools.cache(plan)
        self._kept = functools.cache(self._what_is_kept)  # the same in every step of a training
        self._traced_plan = plan  # torch.compile does not see through a cache
        self._forward_op = define(name, f"{tensors}, {static}, bool[] needs", "Tensor[]", self._forward, self._fake)
        self._backward_op = define(
            f"{name}_bwd",
            "Tensor grad, Tensor[] kept, int num_blocks, SymInt[] block, SymInt[] widths, "
            f"{static}, bool[] kept_for, bool[] needs",
            "Tensor[]", self._backward, self._fake_backward,
        )  # fmt: skip
        qualified = f"{NAMESPACE}::{name}"
        torch.library.register_autograd(
            qualified, self._autograd_backward, setup_context=self._setup_context, lib=_library
        )
        for device in ("CUDA", "CPU"):
            _library.impl(name, self._autocast(device.lower()), f"Autocast{device}")

    def __call__(self, blocks, weights, biases, *static) -> Tensor:
        groups = _as_list(blocks), _as_list(weights), _as_list(biases)
        tensors = [*groups[0], *groups[1], *groups[2]]
        needs = [tensor.requires_grad for tensor in tensors] if torch.is_grad_enabled() else []
        if True not in needs:
            needs = []
        if _is_transformed() and is_ordinary(tensors):
            return composite(self._traced_plan(*static), *groups)
        if torch.compiler.is_compiling() or not is_ordinary(tensors) or is_recorded(tensors[0]):
            return self._forward_op(blocks, weights, biases, *static, needs)[0]
        plan = self.plan(*static)
        if needs:
            lengths = len(groups[0]), len(groups[1])
            return _Eager.apply(plan, lengths, needs, self._kept(static, lengths, tuple(needs)), *tensors)
        return run_plan(plan, *groups)[0]

    def _what_is_kept(self, static: tuple, lengths: tuple[int, int], needs: tuple) -> tuple[list[bool], list[int]]:
        """For a backward: of which stages (Needs.keeps), and which of [*blocks, *weights]."""
        found = Needs.of(needs, *lengths)
        return found.keeps(self.plan(*static).stages), [i for i, read in enumerate(found.reads()) if read]

    def _forward(self, blocks, weights, biases, *static_and_needs) -> list[Tensor]:
        *static, needs = static_and_needs
        plan, groups = self.plan(*static), [_as_list(group) for group in (blocks, weights, biases)]
        keep = Needs.of(needs, len(groups[0]), len(groups[1])).keeps(plan.stages) if needs else ()
        y, saved = run_plan(plan, *groups, keep=keep)
        return [y, *saved]

    def _fake(self, blocks, weights, biases, *static_and_needs) -> list[Tensor]:
        *static, needs = static_and_needs
        stages, skip = self.plan(*static)
        blocks, weights = _as_list(blocks), _as_list(weights)
        keep = Needs.of(needs, len(blocks), len(weights)).keeps(stages) if needs else [False] * len(stages)
        block = blocks[0][:, skip:]
        saved = []
        for i, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
            rows, n = block.shape[0] * stage.tokens(block.shape), weight.shape[0]
            y = block.new_empty(stage.out_shape(block.shape, n))
            if keep[i]:
                saved.append(y if stage.activation is None else block.new_empty((rows, n)))
            block = y
        return [block, *saved]

    def _setup_context(self, ctx, inputs, output) -> None:
        ctx.forms, ctx.static, ctx.kept_for = [Form.of(value) for value in inputs[:3]], inputs[3:-1], inputs[-1]
        ctx.backend = current_backend()
        blocks, weights = _as_list(inputs[0]), _as_list(inputs[1])
        ctx.sizes = Sizes.of(blocks, weights)
        operands = [*blocks, *weights]
        kept = self._what_is_kept(ctx.static, (len(blocks), len(weights)), ctx.kept_for)[1] if ctx.kept_for else ()
        ctx.save_for_backward(*output[1:], *[operands[i] for i in kept])

    def _autograd_backward(self, ctx, grads):
        _refuse_unsupported(grads[0])
        wanted = [
            need for form, flag in zip(ctx.forms, ctx.needs_input_grad, strict=False) for need in _flags(form, flag)
        ]
        kept_for = list(ctx.kept_for) or [False] * len(wanted)
        if missing := [i for i, want in enumerate(wanted) if want and not kept_for[i]]:
            raise RuntimeError(
                f"needs: the gradient of tensor {missing[0]} is wanted, and the forward was told {list(ctx.kept_for)}; "
                "pass the operator a flag for every tensor, true where a gradient will be wanted"
            )
        with use_backend(ctx.backend):
            kept = list(ctx.saved_tensors)
            found = iter(self._backward_op(grads[0], kept, *ctx.sizes, *ctx.static, kept_for, wanted))
        in_order = [next(found) if want else None for want in wanted]
        return (*_restore_all(ctx.forms, in_order), *(None for _ in ctx.static), None)

    def _backward(self, grad, kept, num_blocks, block, widths, *static_and_needs) -> list[Tensor]:
        *static, kept_for, needs = static_and_needs
        grads = _run_backward(self.plan(*static), Sizes(num_blocks, block, widths), grad, list(kept), kept_for, needs)
        return [g for g, need in zip(grads, needs, strict=True) if need]

    def _fake_backward(self, grad, kept, num_blocks, block, widths, *static_and_needs) -> list[Tensor]:
        *static, _, needs = static_and_needs
        weights = Sizes(num_blocks, block, widths).weights(self.plan(*static).stages)
        shapes = [*[block] * num_blocks, *weights, *[(n,) for n in widths]]
        return [grad.new_empty(shape) for shape, need in zip(shapes, needs, strict=False) if need]

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
    """The same without the dispatcher: apply(plan, (number of blocks, of weights), needs, kept, *tensors) -> y.

    kept: `_what_is_kept` of the needs, so only what the gradients that are wanted will read.
    """

    @staticmethod
    def forward(ctx, plan: Plan, lengths: tuple[int, int], needs: list[bool], kept: tuple, *tensors: Tensor) -> Tensor:
        groups = _split(tensors, (*lengths, len(tensors) - sum(lengths)))
        y, saved = run_plan(plan, *groups, keep=kept[0])
        ctx.plan, ctx.sizes, ctx.kept_for = plan, Sizes.of(*groups[:2]), needs
        ctx.backend = current_backend()  # the backward runs in a thread of its own, where `use_backend` is not seen
        ctx.save_for_backward(*saved, *[tensors[i] for i in kept[1]])
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        _refuse_unsupported(grad)
        kept = list(ctx.saved_tensors)
        # Without retain_graph the node lets go of what it saved, and the backward frees it piece by piece.
        ctx.maybe_clear_saved_tensors()
        with use_backend(ctx.backend):
            grads = _run_backward(ctx.plan, ctx.sizes, grad, kept, ctx.kept_for, ctx.needs_input_grad[4:])
        return (None, None, None, None, *grads)


def run_plan(
    plan: Plan, blocks, weights, biases, *, keep: Sequence[bool] = (), out=None, rows=None
) -> tuple[Tensor, list[Tensor]]:
    """Run a chain's forward -> (output, what is kept of the stages that `keep` flags); biases may be empty."""
    stages, skip = plan
    if skip:
        blocks = [block[:, skip:] for block in blocks]
    return chain_fwd(blocks, weights, biases or [None] * len(weights), stages, keep=keep, out=out, rows=rows)


def _run_backward(
    plan: Plan, sizes: Sizes, grad: Tensor, kept: list[Tensor], kept_for: Sequence[bool], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of [*blocks, *weights, *biases], with zeros for the skipped tokens; None where not needed.

    kept: what a forward told `kept_for` keeps of its stages, then what it reads of blocks and weights. It is emptied.
    """
    (stages, skip), counts = plan, (sizes.num_blocks, len(sizes.widths))
    forward = Needs.of(kept_for, *counts)
    flags, tensors = [*forward.keeps(stages), *forward.reads()], iter(kept)
    saved, blocks, weights = _split([next(tensors) if flag else None for flag in flags], (len(stages), *counts))
    kept.clear()
    blocks = [None if block is None else block[:, skip:] for block in blocks]
    # A backward called inside an autocast region must not have its products cast: they are in the forward's dtype.
    with torch.autocast(grad.device.type, enabled=False):
        d_blocks, d_weights, d_biases = chain_bwd(
            grad, saved, blocks, weights, sizes.without(skip), stages, Needs.of(needs, *counts)
        )
    if skip:
        d_blocks = [g if g is None else nn.functional.pad(g, (0, 0, skip, 0)) for g in d_blocks]
    return [*d_blocks, *d_weights, *d_biases[: len(needs) - sum(counts)]]


def _split(items: Sequence, sizes: Sequence[int]) -> list[list]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(items[start : start + size]))
        start += size
    return parts


def _flags(form: Form, flag: bool | Sequence[bool]) -> list[bool]:
    """ctx.needs_input_grad of one argument, a flag for each of its tensors."""
    return list(flag) if form.is_list else [flag] * form.count


def is_ordinary(tensors: Sequence[Tensor]) -> bool:
    """No subclass, which may have operators of its own."""
    return _ORDINARY.issuperset(map(type, tensors))


def is_recorded(x: Tensor) -> bool:
    """A kernel would run where a mode records (FLOP counters, make_fx) what goes through the dispatcher."""
    return torch._C._len_torch_dispatch_stack() > 0 and use_triton(x.device, x.dtype)


def _is_transformed() -> bool:
    """Inside torch.func's grad, vjp, jvp, vmap, or at a level of forward-mode differentiation."""
    # isinstance: a tracer of torch.compile takes an absent interpreter for an object that is not None
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return isinstance(interpreter, torch._C._functorch.CInterpreter) or forward_ad._current_level >= 0


def _refuse_unsupported(grad: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "stf_kernels: double backward (create_graph=True) is not supported; "
            "compute higher derivatives with the modules of `reference`"
        )
    # by name: of the two kinds of batched tensors torch has an enumerator for one
    if not torch.compiler.is_compiling() and "Batched" in repr(torch._C._dispatch_keys(grad)):
        raise RuntimeError(
            "stf_kernels: a batch of gradients (is_grads_batched=True, vectorize=True, vmap of autograd.grad) is not "
            "supported; torch.func.jacrev is, and so is one gradient at a time"
        )
