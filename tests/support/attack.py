"""Calls drawn by hypothesis: operands and results between guard pages, strides and values of every kind.

    python -m tests.support.attack KIND... --cases N [--seed S]

With TRITON_INTERPRET=1 the kernels compute, interpreted, else plain torch. Exit status 0: every case is right; 1: one
is wrong, and its smallest form is printed; -11 (SIGSEGV): memory outside an operand was touched, by the case in --last.

Errors are held to the house's rule row by row, and a few roundings of the sums of absolute values are allowed beside
it: on a tiny shape torch may be exact by luck. NaN and infinity must come where torch in the same dtype has them, or
float64.
"""

import argparse
import contextlib
import copy
import faulthandler
import warnings
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import reference
import stf_kernels
from reference.functional import activate, spatial_merge
from stf_kernels.backend import interpreting
from stf_kernels.configs import GemmConfig
from stf_kernels.ops import launch, tma
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage
from stf_kernels.ops.weight_grad import launch_wgrad

from .guard import Guard, between_pages, span
from .operators import ACTIVATIONS
from .stages import matrix

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
CONTIGUOUS = ("dense", "cropped", "pitched", "batch inner", "one image", "one token", "overlapping")
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


def compare(name, ours, same, exact, bound, roundings):
    assert (ours.shape, ours.dtype) == (same.shape, same.dtype), f"{name}: {ours.shape} {ours.dtype}"
    if not ours.numel():
        return
    kind = kinds_of(ours)
    fine = (kind == kinds_of(same)) | (kind == kinds_of(exact.to(ours.dtype)))
    assert fine.all(), f"{name}: {ours[~fine][:4]} where torch has {same[~fine][:4]}, float64 {exact[~fine][:4]}"
    room = roundings * torch.finfo(ours.dtype).eps * bound
    finite = ours.isfinite() & same.isfinite() & exact.isfinite() & room.isfinite()
    ours, same, exact, room = (torch.where(finite, t.double(), 0.0) for t in (ours, same, exact, room))
    above = (ours - exact).abs() - 2 * (same - exact).abs().amax(-1, keepdim=True) - 1e-6 - room
    assert above.max() <= 0, f"{name}: error {above.max():.3g} above what is allowed"


def plain(leaf, dtype):
    """A copy of its own, dense and of its own sign, for the reference."""
    return None if leaf is None else leaf.detach().resolve_neg().contiguous().clone().to(dtype)


def attempt(calls, leaves, dtype, *, seed, roundings, gradient=None, parameters=((), (), (), ())):
    """calls: ours, the reference in dtype and in float64, the same without activations, which of absolute values is a
    bound; each of its own leaves (and of its parameters). gradient: how the one that is sent back lies, or None."""
    results, sent, before = [], None, [plain(leaf, dtype) for leaf in leaves]
    for run, (call, own) in enumerate(zip(calls, parameters, strict=True)):
        to = dtype if run < 2 else torch.float64
        mine = leaves if run == 0 else [plain(leaf, to) for leaf in leaves]
        if run == 3:
            mine = [None if leaf is None else leaf.abs() for leaf in mine]
        wanted = [leaf.requires_grad_(gradient is not None) for leaf in (*mine, *own) if leaf is not None]
        with Guard(seed) if run == 0 else contextlib.nullcontext():
            y = call(mine)
            if gradient is not None:
                sent = operand(y.shape, gradient, dtype) if run == 0 else plain(sent, to)
                found = torch.autograd.grad(y, wanted, sent.abs() if run == 3 else sent, allow_unused=True)
                y = (y, *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, wanted, strict=True)))
        results.append([t.detach() for t in (y if isinstance(y, tuple) else (y,))])
    for leaf, held in zip(leaves, before, strict=True):
        assert leaf is None or same_values(leaf.detach(), held), "an operand was changed"
    for i, (found, same, exact, bound) in enumerate(zip(*results, strict=True)):
        compare(f"gradient {i - 1}" if i else "output", found, same, exact, bound, roundings)


def same_values(x, y):
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


KINDS = {}


def kind(**strategies):
    def register(function):
        KINDS[function.__name__] = (st.fixed_dictionaries({"seed": st.integers(0, 10**6), **strategies}), function)
        return function

    return register


def dtypes():
    return st.sampled_from(DTYPES if interpreting() else (*DTYPES, torch.float64))


ACTIVATION, SKIP, BATCH = st.sampled_from(ACTIVATIONS), st.integers(0, 2), st.integers(0, 3)
CHANNELS, WIDTH, SIDE = st.integers(1, 20), st.integers(1, 36), st.integers(1, 5)
DTYPE, GRADIENT = st.deferred(dtypes), st.one_of(st.none(), OPERAND)
BLOCKS = st.lists(OPERAND, min_size=1, max_size=4)
AGAIN = st.lists(st.integers(0, 3), max_size=2)  # blocks that are given once more


def layer(c, rows, k, dtype):
    weight = operand((rows, k), c["weight"], dtype, k**-0.5)
    return weight, None if c["bias"] is None else operand((rows,), c["bias"], dtype)


LAYER = {"weight": OPERAND, "bias": st.one_of(st.none(), OPERAND), "n": WIDTH}
CONCAT = {"blocks": BLOCKS, "again": AGAIN, "batch": BATCH, "tokens": st.integers(0, 9), "c": CHANNELS}


def draw_blocks(c, dtype, tokens):
    """(blocks without those that are given twice, which of them are given)"""
    blocks = [operand((c["batch"], tokens, c["c"]), drawn, dtype) for drawn in c["blocks"]]
    return blocks, [*range(len(blocks)), *(i % len(blocks) for i in c["again"])]


@kind(**CONCAT, **LAYER, dtype=DTYPE, activation=ACTIVATION, skip=SKIP, gradient=GRADIENT)
def concat_linear(**c):
    dtype = c["dtype"]
    blocks, given_ = draw_blocks(c, dtype, c["tokens"] + c["skip"])
    weight, bias = layer(c, c["n"], len(given_) * c["c"], dtype)
    options = {"activation": c["activation"], "skip_tokens": c["skip"]}

    def call(package, leaves, **changes):
        weight, bias, *blocks = leaves
        return package.concat_linear([blocks[i] for i in given_], weight, bias, **options | changes)

    calls = four(call)
    attempt(calls, [weight, bias, *blocks], dtype, seed=c["seed"], roundings=2, gradient=c["gradient"])


def four(call):
    return [
        *(partial(call, package) for package in (stf_kernels, reference, reference)),
        partial(call, reference, activation=None),
    ]


MERGE = {"x": OPERAND, "batch": BATCH, "height": SIDE, "width": SIDE, "r": st.integers(1, 3), "c": CHANNELS}


@kind(**MERGE, **LAYER, dtype=DTYPE, activation=ACTIVATION, skip=SKIP, gradient=GRADIENT)
def spatial_merge_linear(**c):
    dtype, grid, r = c["dtype"], (c["height"], c["width"]), c["r"]
    x = operand((c["batch"], c["skip"] + grid[0] * grid[1], c["c"]), c["x"], dtype)
    weight, bias = layer(c, c["n"], r * r * c["c"], dtype)
    options = {"grid": grid, "merge_size": r, "truncate": True, "activation": c["activation"], "skip_tokens": c["skip"]}

    def call(package, leaves, **changes):
        return package.spatial_merge_linear(leaves[2], *leaves[:2], **options | changes)

    calls = four(call)
    attempt(calls, [weight, bias, x], dtype, seed=c["seed"], roundings=2, gradient=c["gradient"])


def modules(c, name, *arguments, **options):
    """Ours with its parameters between pages, the reference in the dtype, in float64, and what bounds it."""
    options |= {"activation": c["activation"], "bias": c["biased"]}
    same = getattr(reference, name)(*arguments, **options).to(c["dtype"])
    ours, exact = (getattr(package, name)(*arguments, **options) for package in (stf_kernels, reference))
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


def attempt_modules(four_, call, leaves, c, roundings):
    calls, parameters = [partial(call, module) for module in four_], [list(m.parameters()) for m in four_]
    for module in four_:
        module.requires_grad_(c["gradient"] is not None)
    attempt(
        calls, leaves, c["dtype"], seed=c["seed"], roundings=roundings, gradient=c["gradient"], parameters=parameters
    )


SINGLE = st.sampled_from(["dense", "cropped", "pitched", "transposed", "channels apart"])  # they name an element once
STORED = st.tuples(SINGLE, st.integers(1, 3), st.booleans(), st.booleans())
MODULE = {
    "parameters": st.lists(STORED, min_size=8, max_size=8),
    "biased": st.booleans(),
    "dtype": DTYPE,
    "activation": ACTIVATION,
    "hidden": WIDTH,
    "n": WIDTH,
    "gradient": GRADIENT,
}


@kind(**CONCAT, **MODULE, skip=SKIP)
def MultiBlockTokenFusion(**c):
    blocks, given_ = draw_blocks(c, c["dtype"], c["tokens"] + c["skip"])
    four_ = modules(c, "MultiBlockTokenFusion", len(given_), c["c"], c["hidden"], c["n"], skip_tokens=c["skip"])
    attempt_modules(four_, lambda module, x: module([x[i] for i in given_]), blocks, c, 4)


@kind(**MERGE, **MODULE)
def SpatialTokenFusion(**c):
    x, grid = operand((c["batch"], c["height"] * c["width"], c["c"]), c["x"], c["dtype"]), (c["height"], c["width"])
    options = {"merge_size": c["r"], "hidden_dim": c["hidden"], "truncate": True}
    four_ = modules(c, "SpatialTokenFusion", c["c"], c["n"], **options)
    attempt_modules(four_, lambda module, x: module(x[0], grid), [x], c, 4)


PROJECTOR = CONCAT | {name: MERGE[name] for name in ("height", "width", "r")} | MODULE | {"skip": SKIP}


def projector(c):
    blocks, given_ = draw_blocks(c, c["dtype"], c["height"] * c["width"] + c["skip"])
    options = {"merge_size": c["r"], "mbtf_hidden_dim": c["hidden"], "stf_hidden_dim": 24, "truncate": True}
    four_ = modules(c, "CompactTokenProjector", len(given_), c["c"], c["n"], skip_tokens=c["skip"], **options)
    return four_, blocks, lambda module, x, **o: module([x[i] for i in given_], (c["height"], c["width"]), **o)


@kind(**PROJECTOR)
def CompactTokenProjector(**c):
    four_, blocks, call = projector(c)
    attempt_modules(four_, call, blocks, c, 8)


@kind(**PROJECTOR, out=STORED, spare=st.integers(0, 4), rows_apart=st.booleans())
def indexed_rows(**c):
    """out and rows: the rows that are named hold the result, everything else what it held."""
    c |= {"gradient": None}
    four_, blocks, call = projector(c)
    count = c["batch"] * (c["height"] // c["r"]) * (c["width"] // c["r"])
    layout = c["out"] if c["out"][0] in ("dense", "cropped", "pitched") else ("dense", *c["out"][1:])
    out = operand((count + c["spare"], c["n"]), (layout, []), c["dtype"])
    order = torch.randperm(count + c["spare"])[:count]
    rows = between_pages(count * (2 if c["rows_apart"] else 1), torch.int64, True)[:: 2 if c["rows_apart"] else 1]
    rows.copy_(order)
    before = out.clone()

    def into_rows(module, x):
        if module is not four_[0]:
            return call(module, x).flatten(0, 1)
        assert call(module, x, out=out, rows=rows) is out
        others = torch.ones(len(out), dtype=torch.bool).index_fill_(0, order, False)
        assert same_values(out[others], before[others]), "a row that was not named has changed"
        return out[order]

    attempt_modules(four_, into_rows, blocks, c, 8)


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
PHASES = (Phase.generate, Phase.shrink)
ran = Counter()


def draw_stage(c, form):
    """merge_in, merge_out or neither, with operands that the form can name more often than chance would."""
    merge = c["r"] if c["merge"] else 1
    if form == "pointer" and c["merge"] == "in":
        c |= {"blocks": c["blocks"][:1], "again": []}
        return Stage(c["activation"], merge_in=merge, grid=(c["height"], c["width"])), c["height"] * c["width"]
    if form == "swap_ab":
        c |= {"blocks": c["blocks"][:1], "again": []}
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


STAGE = {**CONCAT, **LAYER, "height": SIDE, "width": SIDE, "r": st.integers(1, 3), "activation": ACTIVATION,
         "dtype": DTYPE, "merge": st.sampled_from(["", "", "in", "out"])}  # fmt: skip


def form_of(form):
    """One stage on one form of kernel, with a pre-activation, rows by index, or neither."""

    def run(**c):
        stage, tokens = draw_stage(c, form)
        dtype, config = c["dtype"], FORMS[form][c["config"] % len(FORMS[form])]
        leaves, given_ = draw_blocks(c, dtype, tokens)
        weight, bias = layer(c, c["n"], stage.num_segments(given_) * c["c"], dtype)
        m = c["batch"] * stage.tokens(leaves[0].shape)
        indexed = c["saved"] == "rows" and stage.merge_out == 1
        order = torch.randperm(m + 3)[:m]

        def ours(leaves):
            weight, bias, *blocks = leaves
            out = operand((m + 3, c["n"]), (("pitched", 2, True, False), []), dtype) if indexed else None
            rows = between_pages(m, torch.int64, True).copy_(order) if indexed else None
            options = {"save_pre": c["saved"] == "pre", "out": out, "rows": rows}
            try:
                y, pre = run_stage([blocks[i] for i in given_], weight, bias, stage, config, **options)
            except tma.Refused:
                ran["refused"] += 1
                y, pre = run_stage([blocks[i] for i in given_], weight, bias, stage, config.portable(), **options)
            ran[form] += 1
            return (y[order] if indexed else y, *([] if pre is None else [pre]))

        def theirs(leaves, activation=stage.activation):
            weight, bias, *blocks = leaves
            flat = F.linear(matrix([blocks[i] for i in given_], stage), weight, bias)
            y = activate(flat, activation)
            if stage.merge_out > 1:
                y = spatial_merge(y, stage.grid, stage.merge_out, "patch_major", True)
            return (y.flatten(0, 1) if indexed else y, *([flat.flatten(0, 1)] if c["saved"] == "pre" else []))

        attempt(
            [ours, theirs, theirs, partial(theirs, activation=None)],
            [weight, bias, *leaves],
            dtype,
            seed=c["seed"],
            roundings=2,
        )

    run.__name__ = form
    kind(**STAGE, config=st.integers(0, 3), saved=st.sampled_from(["", "pre", "rows"]))(run)


@kind(**STAGE, g=OPERAND, config=st.sampled_from([GemmConfig(32, 32, 32, group_m=2), GemmConfig(16, 16, 16)]))
def weight_gradient(**c):
    """dW = g^T @ A by its kernel; A is concatenated or merged on load."""
    c["merge"] = c["merge"].replace("out", "")
    stage, tokens = draw_stage(c, "pointer")
    leaves, given_ = draw_blocks(c, c["dtype"], tokens)
    g = operand((c["batch"] * stage.tokens(leaves[0].shape), c["n"]), c["g"], c["dtype"])

    def ours(leaves):
        return launch_wgrad(leaves[0], [leaves[1 + i] for i in given_], stage, c["config"])

    def theirs(leaves):
        return leaves[0].t() @ matrix([leaves[1 + i] for i in given_], stage).flatten(0, 1)

    attempt([ours, theirs, theirs, theirs], [g, *leaves], c["dtype"], seed=c["seed"], roundings=2)


def attack(name, cases, seed, last):
    """Draw and try them; `last`, a file, holds the case that is tried."""
    drawn, function = KINDS[name]

    @settings(max_examples=cases, deadline=None, database=None, phases=PHASES, suppress_health_check=HealthCheck)
    @seeded(seed)
    @given(drawn)
    def each(case):
        last.seek(0)
        last.truncate()
        print(name, case, file=last, flush=True)
        ran["cases"] += 1
        torch.manual_seed(case["seed"])
        with stf_kernels.use_backend("triton" if interpreting() else "torch"):
            function(**case)

    ran.clear()
    each()
    print(name, dict(ran), flush=True)


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
    launch.ROWS_PER_PROGRAM = 16  # a strip of the elementwise backward: 128 rows take the interpreter most of its time
    every = [name for name in KINDS if interpreting() or name not in (*FORMS, "weight_gradient")]  # kernels themselves
    with open(options.last, "w") as last:
        for name in every if "all" in options.kinds else options.kinds:
            attack(name, options.cases, options.seed, last)


for form in FORMS:
    form_of(form)

if __name__ == "__main__":
    main()
