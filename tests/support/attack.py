"""Calls drawn by hypothesis: operands and results between guard pages, strides and values of every kind.

    python -m tests.support.attack KIND... --cases N [--seed S]

With TRITON_INTERPRET=1 the kernels compute, interpreted, else plain torch. Exit status 0: every case is right; 1: one
is wrong, and its smallest form is printed; -11 (SIGSEGV): memory outside an operand was touched, by the case in --last.

Errors are held to the house's rule row by row, and a few roundings of the sums of absolute values are allowed beside
it: on a tiny shape torch may be exact by luck. Where strides of zero in two operands make all K products of a sum
equal, every addition may err to the same side, by half an eps of the sum so far, which is k of K products: K / 4 eps
of the sum, in the precision that it is kept in. NaN and infinity must come where torch in the same dtype has them, or
float64.
"""

import argparse
import contextlib
import copy
import faulthandler
import warnings
from functools import partial

import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import reference
import stf_kernels
from stf_kernels.backend import interpreting
from stf_kernels.configs import GemmConfig
from stf_kernels.ops import tma
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

from .guard import Guard, between_pages, span
from .modules import ARGUMENTS
from .operators import ACTIVATIONS
from .stages import by_layers

LAYOUTS = {  # (B, T, C, gap) -> strides
    "dense": lambda b, t, c, gap: (t * c, c, 1),
    "cropped": lambda b, t, c, gap: ((t + gap) * c, c, 1),
    "pitched": lambda b, t, c, gap: (t * (c + gap), c + gap, 1),
    "batch inner": lambda b, t, c, gap: (c, b * c, 1),
    "one image": lambda b, t, c, gap: (0, c, 1),
    "one token": lambda b, t, c, gap: (c, 0, 1),
    "overlapping": lambda b, t, c, gap: (max(1, c // 2), max(1, c // 2), 1),
    "transposed": lambda b, t, c, gap: (t * c, 1, t),
    "channels apart": lambda b, t, c, gap: (2 * t * c, 2 * c, 2),
    "one channel": lambda b, t, c, gap: (t, 1, 0),
}
REPEATING = ("one image", "one token", "one channel")
SPECIAL = {
    "nan": lambda dtype: float("nan"),
    "inf": lambda dtype: float("inf"),
    "-inf": lambda dtype: float("-inf"),
    # so far below fp32's end that the sum of a row stays finite in any order
    "largest": lambda dtype: torch.finfo(dtype).max / (1 if dtype == torch.float16 else 1024),
    "smallest": lambda dtype: torch.finfo(dtype).smallest_normal,
    # the interpreter reads bf16's as zero, which is no zero beside an infinity
    "subnormal": lambda dtype: torch.finfo(dtype).smallest_normal / (1 if dtype == torch.bfloat16 else 4),
    "-0": lambda dtype: -0.0,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUT = st.tuples(st.sampled_from(list(LAYOUTS)), st.integers(1, 3), st.booleans(), st.booleans())
SPECIALS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(list(SPECIAL))), max_size=2)
OPERAND = st.tuples(LAYOUT, st.one_of(st.just([]), SPECIALS))


def operand(shape, drawn, dtype, scale=1.0):
    """A view between guard pages by (layout, specials); what it does not name is NaN. A matrix has B = 1."""
    (layout, gap, at_end, negative), specials = drawn
    four_ = (1,) * (3 - len(shape)) + tuple(shape)
    strides = LAYOUTS[layout](*four_, gap)[3 - len(shape) :]
    flat = between_pages(span(shape, strides), dtype, at_end)
    places = torch.arange(flat.numel()).as_strided(shape, strides).flatten()
    flat[places] = (torch.randn(len(places)) * scale).to(dtype)
    for at, name in specials if len(places) else ():
        flat[places[at % len(places)]] = SPECIAL[name](dtype)
    view = flat.as_strided(shape, strides)
    return torch._neg_view(view) if negative else view


def kinds_of(x):
    """0 finite, 1 NaN, 2 inf, 3 -inf."""
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def compare(name, ours, same, exact, bound, roundings, of_sums, beyond):
    assert (ours.shape, ours.dtype) == (same.shape, same.dtype), f"{name}: {ours.shape} {ours.dtype}"
    if not ours.numel():
        return
    kind = kinds_of(ours)
    fine = (kind == kinds_of(same)) | (kind == kinds_of(exact.to(ours.dtype)))
    if beyond:  # a product beyond fp32 beside an infinity is NaN where it is rounded first, and not where it is fused
        fine |= ours.isnan() & same.isinf()
    assert fine.all(), f"{name}: {ours[~fine][:4]} where torch has {same[~fine][:4]}, float64 {exact[~fine][:4]}"
    kept = torch.promote_types(ours.dtype, torch.float32)
    room = (roundings * torch.finfo(ours.dtype).eps + of_sums * torch.finfo(kept).eps) * bound
    finite = ours.isfinite() & same.isfinite() & exact.isfinite() & room.isfinite()
    ours, same, exact, room = (torch.where(finite, t.double(), 0.0) for t in (ours, same, exact, room))
    above = (ours - exact).abs() - 2 * (same - exact).abs().amax(-1, keepdim=True) - 1e-6 - room
    assert above.max() <= 0, f"{name}: error {above.max():.3g} above what is allowed"


def plain(leaf, dtype):
    """A copy of its own, dense and of its own sign, for the reference."""
    return None if leaf is None else leaf.detach().resolve_neg().contiguous().clone().to(dtype)


def attempt(calls, leaves, c, *, roundings, parameters=((), (), (), ())):
    """calls: ours, the reference in dtype and in float64, the same without activations, which of absolute values is a
    bound; each of its own leaves (and of its parameters). c["gradient"]: how what is sent back lies, or None."""
    dtype, gradient, results, sent = c["dtype"], c["gradient"], [], None
    given_ = [*c["blocks"], *filter(None, (c["weight"], gradient))]
    named = [{name for _, name in specials} for _, specials in (*given_, c["bias"] or ((), ()))]
    infinite = not {"inf", "-inf"}.isdisjoint(set().union(*named))
    if beyond := infinite and dtype != torch.float16 and sum("largest" in names for names in named) > 1:
        gradient = None  # that of an activation is finite at an infinity
    before = [plain(leaf, dtype) for leaf in leaves]
    for run, (call, own) in enumerate(zip(calls, parameters, strict=True)):
        to = dtype if run < 2 else torch.float64
        mine = leaves if run == 0 else [plain(leaf, to) for leaf in leaves]
        if run == 3:
            mine = [None if leaf is None else leaf.abs() for leaf in mine]
        wanted = [leaf.requires_grad_(gradient is not None) for leaf in (*mine, *own) if leaf is not None]
        with Guard(c["seed"]) if run == 0 else contextlib.nullcontext():
            y = call(mine)
            if gradient is not None:
                sent = operand(y.shape, gradient, dtype) if run == 0 else plain(sent, to)
                found = torch.autograd.grad(y, wanted, sent.abs() if run == 3 else sent, allow_unused=True)
                y = (y, *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, wanted, strict=True)))
        results.append([t.detach() for t in (y if isinstance(y, tuple) else (y,))])
    for leaf, held in zip(leaves, before, strict=True):
        assert leaf is None or same_values(leaf.detach(), held), "an operand was changed"
    operands = [t for t in (*leaves, *parameters[0]) if t is not None and t.numel()]
    products = max((max(t.shape[-1], t.numel() // t.shape[-1]) for t in operands), default=0)  # of any sum, at most
    equal = sum(layout[0] in REPEATING for layout, _ in given_) > 1
    of_sums = products / 4 * (roundings / 2) if equal else 0  # two roundings a layer
    for i, (found, same, exact, bound) in enumerate(zip(*results, strict=True)):
        compare(f"gradient {i - 1}" if i else "output", found, same, exact, bound, roundings, of_sums, beyond)


def same_values(x, y):
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


WIDTH, SIDE = st.integers(1, 36), st.integers(1, 5)
DRAWN = {
    "seed": st.integers(0, 10**6),
    "dtype": st.deferred(lambda: st.sampled_from(DTYPES if interpreting() else (*DTYPES, torch.float64))),
    "blocks": st.lists(OPERAND, min_size=1, max_size=4),
    "again": st.lists(st.integers(0, 3), max_size=2),  # blocks that are given once more
    "batch": st.integers(0, 3),
    "tokens": st.integers(0, 9),
    "skip": st.integers(0, 2),
    "c": st.integers(1, 20),
    "n": WIDTH,
    "weight": OPERAND,
    "bias": st.one_of(st.none(), OPERAND),
    "activation": st.sampled_from(ACTIVATIONS),
    "height": SIDE,
    "width": SIDE,
    "r": st.integers(1, 3),
    "gradient": st.one_of(st.none(), OPERAND),
}
KINDS = {}


def kind(**strategies):
    def register(function):
        KINDS[function.__name__] = (st.fixed_dictionaries(DRAWN | strategies), function)
        return function

    return register


def draw_blocks(c, tokens):
    """(blocks without those that are given twice, which of them are given)"""
    blocks = [operand((c["batch"], tokens, c["c"]), drawn, c["dtype"]) for drawn in c["blocks"]]
    return blocks, [*range(len(blocks)), *(i % len(blocks) for i in c["again"])]


def draw_layer(c, k):
    weight = operand((c["n"], k), c["weight"], c["dtype"], k**-0.5)
    return weight, None if c["bias"] is None else operand((c["n"],), c["bias"], c["dtype"])


def take_one_block(c):
    c |= {"blocks": c["blocks"][:1], "again": []}


@kind(merge=st.booleans())
def functions(**c):
    options = {"activation": c["activation"], "skip_tokens": c["skip"]}
    if c["merge"]:
        take_one_block(c)
        c["tokens"] = c["height"] * c["width"]
        options |= {"grid": (c["height"], c["width"]), "merge_size": c["r"], "truncate": True}
    blocks, given_ = draw_blocks(c, c["tokens"] + c["skip"])
    weight, bias = draw_layer(c, (c["r"] ** 2 if c["merge"] else len(given_)) * c["c"])

    def call(package, leaves, **changes):
        weight, bias, *blocks = leaves
        if c["merge"]:
            return package.spatial_merge_linear(blocks[0], weight, bias, **options | changes)
        return package.concat_linear([blocks[i] for i in given_], weight, bias, **options | changes)

    calls = [partial(call, package) for package in (stf_kernels, reference, reference)]
    calls.append(partial(call, reference, activation=None))
    attempt(calls, [weight, bias, *blocks], c, roundings=2)


SINGLE = st.sampled_from(["dense", "cropped", "pitched", "transposed", "channels apart"])  # they name an element once
STORED = st.tuples(SINGLE, st.integers(1, 3), st.booleans(), st.booleans())
FUSION, MERGING, PROJECTOR = ARGUMENTS


def draw_modules(c, count):
    """(ours with its parameters between pages, the reference in the dtype, in float64, and what bounds it)"""
    skip, merge = {"skip_tokens": c["skip"]}, {"merge_size": c["r"], "truncate": True}
    arguments, options = {
        FUSION: ((count, c["c"], c["hidden"], c["n"]), skip),
        MERGING: ((c["c"], c["n"]), merge | {"hidden_dim": c["hidden"]}),
        PROJECTOR: ((count, c["c"], c["n"]), skip | merge | {"mbtf_hidden_dim": c["hidden"], "stf_hidden_dim": 24}),
    }[c["name"]]
    options |= {"activation": c["activation"], "bias": c["biased"]}
    same, ours, exact = (
        getattr(package, c["name"])(*arguments, **options).requires_grad_(c["gradient"] is not None)
        for package in (reference, stf_kernels, reference)
    )
    same.to(c["dtype"])
    for module, to in ((ours, c["dtype"]), (exact, torch.float64)):
        module.to(to).load_state_dict(same.state_dict())
    for parameter, drawn in zip(ours.parameters(), c["parameters"], strict=False):
        parameter.data = operand(parameter.shape, (drawn, []), c["dtype"]).copy_(parameter.data)
    bound = copy.deepcopy(exact)
    for module in bound.modules():
        module.activation = None
    for parameter in bound.parameters():
        parameter.data.abs_()
    return ours, same, exact, bound


@kind(
    name=st.sampled_from([*ARGUMENTS, "rows of out"]),
    parameters=st.lists(STORED, min_size=8, max_size=8),
    biased=st.booleans(),
    hidden=WIDTH,
    out=STORED,
    spare=st.integers(0, 4),
    rows_apart=st.booleans(),
)
def modules(**c):
    """With out and rows the rows that are named hold the result, everything else what it held."""
    indexed = c["name"] == "rows of out"
    if indexed:
        c |= {"name": PROJECTOR, "gradient": None}
    if c["name"] == MERGING:
        take_one_block(c)
        c["skip"] = 0
    grid = c["height"], c["width"]
    blocks, given_ = draw_blocks(c, grid[0] * grid[1] + c["skip"])
    drawn = draw_modules(c, len(given_))
    count = c["batch"] * (grid[0] // c["r"]) * (grid[1] // c["r"])
    order = torch.randperm(count + c["spare"])[:count]

    def call(module, leaves, **into):
        x = [leaves[i] for i in given_]
        if c["name"] == FUSION:
            return module(x)
        return module(x[0] if c["name"] == MERGING else x, grid, **into)

    def into_rows(module, leaves):
        if module is not drawn[0]:
            return call(module, leaves).flatten(0, 1)
        layout = c["out"] if c["out"][0] in ("dense", "cropped", "pitched") else ("dense", *c["out"][1:])
        out = operand((count + c["spare"], c["n"]), (layout, []), c["dtype"])
        step = 2 if c["rows_apart"] else 1
        rows, before = between_pages(count * step, torch.int64, True)[::step].copy_(order), out.clone()
        assert call(module, leaves, out=out, rows=rows) is out
        others = torch.ones(len(out), dtype=torch.bool).index_fill_(0, order, False)
        assert same_values(out[others], before[others]), "a row that was not named has changed"
        return out[order]

    calls, parameters = [partial(into_rows if indexed else call, m) for m in drawn], [[*m.parameters()] for m in drawn]
    layers = sum(parameter.ndim == 2 for parameter in parameters[0])
    attempt(calls, blocks, c, roundings=2 * layers, parameters=parameters)


FORMS = {
    "pointer": [
        GemmConfig(32, 32, 32, group_m=2),
        GemmConfig(16, 16, 16, group_m=1),
        GemmConfig(16, 32, 16, split_k=2),
        GemmConfig(32, 16, 32, split_k=5),  # more parts than steps
    ],
    "tma": [GemmConfig(64, 16, 16, form="tma"), GemmConfig(128, 32, 16, group_m=2, form="tma")],
    "swap_ab": [
        GemmConfig(16, 16, 16, form="swap_ab", tail_m=16),
        GemmConfig(32, 16, 32, form="swap_ab", tail_m=16, split_k=3),
    ],
}


def draw_stage(c, form):
    """merge_in, merge_out or neither, with operands that the form can name more often than chance would."""
    merge = c["r"] if c["merge"] else 1
    if form == "pointer" and c["merge"] == "in":
        take_one_block(c)
        return Stage(c["activation"], merge_in=merge, grid=(c["height"], c["width"])), c["height"] * c["width"]
    if form == "swap_ab":
        take_one_block(c)
    if form != "pointer":
        simple = [
            ((layout if layout in ("dense", "pitched") else "dense", 16 // c["dtype"].itemsize, at_end, False), special)
            for (layout, _, at_end, _), special in c["blocks"]
        ]
        c |= {"blocks": simple, "batch": 1, "c": 16 * (1 + c["c"] % 2), "n": 8 * (1 + c["n"] % 4), "again": []}
        c |= {"weight": (("dense", 1, c["weight"][0][2], False), c["weight"][1])}
    if c["merge"] == "out":
        return Stage(merge_out=merge, grid=(c["height"], c["width"])), c["height"] * c["width"]
    return Stage(c["activation"]), c["tokens"]


MERGES = st.sampled_from(["", "", "in", "out"])


@kind(
    form=st.sampled_from([*FORMS]), config=st.integers(0, 3), merge=MERGES, saved=st.sampled_from(["", "pre", "rows"])
)
def stages(**c):
    """One stage on one form of kernel, with a pre-activation, rows by index, or neither."""
    configs, (stage, tokens) = FORMS[c["form"]], draw_stage(c, c["form"])
    c["gradient"], config = None, configs[c["config"] % len(configs)]
    leaves, given_ = draw_blocks(c, tokens)
    weight, bias = draw_layer(c, stage.num_segments(given_) * c["c"])
    m = c["batch"] * stage.tokens(leaves[0].shape)
    indexed = c["saved"] == "rows" and stage.merge_out == 1
    order = torch.randperm(m + 3)[:m]

    def ours(leaves):
        weight, bias, *blocks = leaves
        out = operand((m + 3, c["n"]), (("pitched", 2, True, False), []), c["dtype"]) if indexed else None
        rows = between_pages(m, torch.int64, True).copy_(order) if indexed else None
        x, options = [blocks[i] for i in given_], {"save_pre": c["saved"] == "pre", "out": out, "rows": rows}
        try:
            y, pre = run_stage(x, weight, bias, stage, config, **options)
        except tma.Refused:
            reject()  # another case is drawn in its place; too many are an error
        return (y[order] if indexed else y, *([] if pre is None else [pre]))

    def theirs(leaves, activation=stage.activation):
        weight, bias, *blocks = leaves
        pre, y = by_layers([blocks[i] for i in given_], weight, bias, stage, activation)
        return (y.flatten(0, 1) if indexed else y, *([pre] if c["saved"] == "pre" else []))

    calls = [ours, theirs, theirs, partial(theirs, activation=None)]
    attempt(calls, [weight, bias, *leaves], c, roundings=2)


def attack(name, cases, seed, last):
    """Draw and try them; `last`, a file, holds the case that is tried."""
    drawn, function = KINDS[name]

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=set(HealthCheck) - {HealthCheck.filter_too_much},
    )
    @seeded(seed)
    @given(drawn)
    def each(case):
        last.seek(0)
        last.truncate()
        print(name, case, file=last, flush=True)
        torch.manual_seed(case["seed"])
        with stf_kernels.use_backend("triton" if interpreting() else "torch"):
            function(**case)

    each()
    print(name, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="+", choices=[*KINDS, "all"])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", required=True, metavar="FILE", help="holds the case that is tried")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    every = [name for name in KINDS if interpreting() or name != "stages"]  # kernels themselves
    with open(options.last, "w") as last:
        for name in every if "all" in options.kinds else options.kinds:
            attack(name, options.cases, options.seed, last)


if __name__ == "__main__":
    main()
