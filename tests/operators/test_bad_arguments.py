"""If this fails, a function or a module takes a wrong argument, or refuses it after writing, or without naming it, what
was expected and what came."""

import numpy as np
import pytest
import torch
from support.recording import Recorder
from torch import nn, zeros

import stf_kernels
from stf_kernels.ops import operators

M, B, T, C, N = 3, 2, 6, 8, 5
BLOCK, WEIGHT = zeros(B, T, C), zeros(N, M * C)
X, GRID = zeros(B, 24, C), (4, 6)
GOOD_CONCAT = {"blocks": [BLOCK] * M, "weight": WEIGHT}
GOOD_MERGE = {"x": X, "weight": zeros(N, 32), "grid": GRID, "merge_size": 2}


def refused(function, error, match, *arguments, **options):
    """Before anything is computed."""
    with Recorder() as recorder, pytest.raises(error, match=match):
        function(*arguments, **options)
    assert recorder.matrix_products() == 0


def each(table):
    return pytest.mark.parametrize(("change", "error", "match"), table.values(), ids=table)


def as_third(block):
    return {"blocks": [BLOCK, BLOCK, block]}


CONCAT = {
    "no blocks": ({"blocks": []}, ValueError, r"blocks.*at least one.*none"),
    "a tensor": ({"blocks": zeros(M, B, T, C)}, TypeError, r"blocks.*list.*Tensor"),
    "a block that is no tensor": (as_third([1.0]), TypeError, r"blocks\[2\].*tensor.*list"),
    "thirty-three": ({"blocks": [BLOCK] * 33}, ValueError, r"blocks.*32.*33"),
    "two axes": ({"blocks": [zeros(T, C)] * M}, ValueError, r"blocks\[0\].*\[B, T, C\].*\(6, 8\)"),
    "other tokens": (as_third(zeros(B, 5, C)), ValueError, r"blocks\[2\].*\(2, 6, 8\).*\(2, 5, 8\)"),
    "other dtype": (as_third(BLOCK.half()), TypeError, r"blocks\[2\].*float32.*float16"),
    "the second's dtype": ({"blocks": [BLOCK, BLOCK.half()]}, TypeError, r"blocks\[1\].*blocks\[0\].*float32.*float16"),
    "other device": (as_third(BLOCK.to("meta")), ValueError, r"blocks\[2\].*device.*cpu.*meta"),
    "integers": ({"blocks": [BLOCK.long()] * M}, TypeError, r"blocks\[0\].*float16.*float64.*int64"),
    "weight too narrow": ({"weight": zeros(N, 23)}, ValueError, r"weight.*\[N, 24\].*3 blocks of 8.*\(5, 23\)"),
    "weight of one axis": ({"weight": zeros(24)}, ValueError, r"weight.*\[N, 24\].*\(24,\)"),
    "weight of another dtype": ({"weight": WEIGHT.half()}, TypeError, r"weight.*float32.*float16"),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, r"weight.*device.*cpu.*meta"),
    "weight a list": ({"weight": WEIGHT.tolist()}, TypeError, r"weight.*tensor.*list"),
    "bias too long": ({"bias": zeros(6)}, ValueError, r"bias.*\(5,\).*\(6,\)"),
    "bias of two axes": ({"bias": zeros(1, 5)}, ValueError, r"bias.*\(5,\).*\(1, 5\)"),
    "bias of another dtype": ({"bias": zeros(5).double()}, TypeError, r"bias.*float32.*float64"),
    "bias elsewhere": ({"bias": zeros(5, device="meta")}, ValueError, r"bias.*device.*cpu.*meta"),
    "bias a number": ({"bias": 0.0}, TypeError, r"bias.*tensor.*float"),
    "activation": ({"activation": "relu"}, ValueError, r"activation.*gelu.*silu.*'relu'"),
    "activation an array": ({"activation": np.array(["gelu"])}, ValueError, r"activation.*gelu.*array"),
    "skip below zero": ({"skip_tokens": -1}, ValueError, r"skip_tokens.*at least 0.*-1"),
    "skip too many": ({"skip_tokens": 7}, ValueError, r"skip_tokens.*6.*7"),
    "skip a float": ({"skip_tokens": 1.0}, TypeError, r"skip_tokens.*int.*1\.0"),
    "skip a truth value": ({"skip_tokens": True}, TypeError, r"skip_tokens.*int.*True"),
}
MERGE = {
    "x no tensor": ({"x": [1.0]}, TypeError, r"x: .*tensor.*list"),
    "tokens": ({"x": zeros(B, 25, C)}, ValueError, r"grid.*25.*\(4, 6\).*24"),
    "skip too many": ({"skip_tokens": 25}, ValueError, r"skip_tokens.*24.*25"),
    "skip leaves another count": ({"skip_tokens": 1}, ValueError, r"grid.*23.*24"),
    "height": ({"grid": (3, 8)}, ValueError, r"grid.*\(3, 8\).*merge_size=2.*truncate=True"),
    "width": ({"grid": (8, 3)}, ValueError, r"grid.*\(8, 3\).*merge_size=2.*truncate=True"),
    "one side": ({"grid": (24,)}, TypeError, r"grid.*\(H, W\).*\(24,\)"),
    "a number": ({"grid": 24}, TypeError, r"grid.*\(H, W\).*24"),
    "floats": ({"grid": (4.0, 6.0)}, TypeError, r"grid H.*int.*4\.0"),
    "zero side": ({"grid": (0, 6), "x": X[:, :0]}, ValueError, r"grid H.*at least 1.*0"),
    "text": ({"grid": "46"}, TypeError, r"grid.*\(H, W\).*'46'"),
    "no grid": ({"grid": None}, TypeError, r"grid.*\(H, W\).*None"),
    "truncate a word": ({"truncate": "False"}, TypeError, r"truncate.*True or False.*'False'"),
    "merge size zero": ({"merge_size": 0}, ValueError, r"merge_size.*1.*0"),
    "merge size too large": ({"merge_size": 17}, ValueError, r"merge_size.*16.*17"),
    "order": ({"feature_order": "unfold"}, ValueError, r"feature_order.*patch_major.*channel_major.*'unfold'"),
    "weight": ({"weight": zeros(N, 31)}, ValueError, r"weight.*\[N, 32\].*2x2.*8.*\(5, 31\)"),
    "channel-major": ({"weight": zeros(N, 30), "feature_order": "channel_major"}, ValueError, r"weight.*\[N, 32\]"),
    "activation": ({"activation": "gelu_new"}, ValueError, r"activation.*gelu_tanh.*'gelu_new'"),
}


@each(CONCAT)
def test_concat_linear(change, error, match):
    refused(stf_kernels.concat_linear, error, match, **GOOD_CONCAT | change)


@each({what: CONCAT[what] for what in ("weight a list", "bias a number")})
def test_what_is_no_tensor_is_named_under_autocast_too(change, error, match):
    with torch.autocast("cpu", torch.bfloat16):
        refused(stf_kernels.concat_linear, error, match, **GOOD_CONCAT | change)


@each(MERGE)
def test_spatial_merge_linear(change, error, match):
    refused(stf_kernels.spatial_merge_linear, error, match, **GOOD_MERGE | change)


def test_the_unchanged_arguments_are_accepted():
    """Else every refusal above proves nothing."""
    stf_kernels.concat_linear(**GOOD_CONCAT)
    for grid in (GRID, list(GRID), torch.Size(GRID)):
        stf_kernels.spatial_merge_linear(**GOOD_MERGE | {"grid": grid})


def test_windows_divide_the_grid_by_default():
    with pytest.raises(ValueError, match="truncate=True"):
        stf_kernels.SpatialTokenFusion(8, 5)(zeros(1, 15, 8), (3, 5))


def test_several_blocks_are_not_merged():
    """The kernel and torch.func would order the columns otherwise, and a gradient has no shape to take."""
    blocks, weight = [torch.randn(1, 16, 4)] * 2, torch.randn(3, 32)
    with pytest.raises(ValueError, match="blocks: a stage that merges on load takes one block, got 2"):
        operators.spatial_merge_linear(blocks, [weight], [], None, 0, 2, 4, 4)


@pytest.mark.parametrize("other", [{"activation": "gelu"}, {"merge_in": 2}], ids=str)
def test_a_stage_that_merges_on_store_has_nothing_else(other):
    with pytest.raises(ValueError, match="merges on store"):
        stf_kernels.ops.segments.Stage(merge_out=2, grid=(4, 4), **other)


RELAYOUT = {
    "not divisible": ((zeros(6, 10), 2), ValueError, r"weight.*4.*\(6, 10\)"),
    "of one axis": ((zeros(16), 2), ValueError, r"weight.*\(16,\)"),
    "no tensor": (([[0.0] * 16], 2), TypeError, r"weight.*tensor.*list"),
    "no rows": ((zeros(6, 16), 0), ValueError, "merge_size.*0"),
    "a float": ((zeros(6, 16), 2.0), ValueError, "merge_size.*2.0"),
    "a truth value": ((zeros(6, 16), True), ValueError, "merge_size.*True"),
}


@each(RELAYOUT)
def test_relayout(change, error, match):
    refused(stf_kernels.channel_to_patch_major, error, match, *change)
    refused(stf_kernels.patch_to_channel_major, error, match, *change)


@pytest.mark.parametrize(
    ("name", "args", "options", "error", "match"),
    [
        ("MultiBlockTokenFusion", (0, 8), {}, ValueError, r"num_blocks.*1 to 32.*0"),
        ("MultiBlockTokenFusion", (33, 8), {}, ValueError, r"num_blocks.*1 to 32.*33"),
        ("MultiBlockTokenFusion", (2, 0), {}, ValueError, r"dim.*at least 1.*0"),
        ("MultiBlockTokenFusion", (2, 8), {"hidden_dim": 0}, ValueError, r"hidden_dim.*0"),
        ("MultiBlockTokenFusion", (2, 8), {"out_dim": -1}, ValueError, r"out_dim.*-1"),
        ("MultiBlockTokenFusion", (2, 8), {"activation": "relu"}, ValueError, r"activation.*'relu'"),
        ("MultiBlockTokenFusion", (2, 8), {"skip_tokens": -1}, ValueError, r"skip_tokens.*-1"),
        ("MultiBlockTokenFusion", (2, 8), {"bias": 1}, TypeError, r"bias.*True or False.*1"),
        ("MultiBlockTokenFusion", (2, 8), {"dtype": torch.int64}, TypeError, r"dtype.*bfloat16.*int64"),
        ("MultiBlockTokenFusion", (2, 8), {"dtype": "bfloat16"}, TypeError, r"dtype.*'bfloat16'"),
        ("SpatialTokenFusion", (0, 5), {}, ValueError, r"dim.*at least 1.*0"),
        ("SpatialTokenFusion", (8, 5), {"merge_size": 0}, ValueError, r"merge_size.*0"),
        ("SpatialTokenFusion", (8, 5), {"truncate": None}, TypeError, r"truncate.*None"),
        ("CompactTokenProjector", (2, 8, 5), {"mbtf": False}, ValueError, r"num_blocks.*1.*mbtf=False.*2"),
        ("CompactTokenProjector", (0, 8, 5), {"mbtf": False}, ValueError, r"num_blocks.*1 to 32.*0"),
        ("CompactTokenProjector", (1, 8, 5), {"mbtf": False, "skip_tokens": -2}, ValueError, r"skip_tokens.*-2"),
        ("CompactTokenProjector", (2, 8, 5), {"stf_hidden_dim": 0}, ValueError, r"stf_hidden_dim.*0"),
        ("CompactTokenProjector", (2, 8, 5), {"mbtf_hidden_dim": "2"}, TypeError, r"mbtf_hidden_dim.*int.*'2'"),
        ("CompactTokenProjector", (1, 8, 5), {"mbtf": "no"}, TypeError, r"mbtf.*True or False.*'no'"),
    ],
)
def test_constructors(name, args, options, error, match):
    with pytest.raises(error, match=match):
        getattr(stf_kernels, name)(*args, **options)


WRAPPED = pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "hooked"])
TOKENS = zeros(2, 17, 8)
BLOCKS = [TOKENS] * 3


def projector(wrapped=False):
    module = stf_kernels.CompactTokenProjector(3, 8, 5, skip_tokens=1)
    if wrapped:
        module.mbtf.linear_2.register_forward_hook(lambda *_: None)
    return module


FORWARD = {
    "fewer blocks": ((BLOCKS[:2],), ValueError, r"blocks.*3.*num_blocks.*2"),
    "channels": (([zeros(2, 17, 9)] * 3,), ValueError, r"blocks\[0\].*8 channels.*\(2, 17, 9\)"),
    "dtype of the weights": (([TOKENS.bfloat16()] * 3,), TypeError, r"(out|weight).*bfloat16.*float32"),
    "too few tokens": (([TOKENS[:, :0]] * 3,), ValueError, r"skip_tokens.*0.*1"),
    "no square": (([TOKENS[:, :13]] * 3,), ValueError, r"grid.*12.*square.*\(H, W\)"),
    "wrong grid": ((BLOCKS, (4, 5)), ValueError, r"grid.*16.*\(4, 5\).*20"),
    "odd grid": (([TOKENS[:, :16]] * 3, (3, 5)), ValueError, r"grid.*\(3, 5\).*merge_size=2.*truncate=True"),
}


@WRAPPED
@pytest.mark.parametrize("into", [False, True], ids=["returned", "into-out"])
@each(FORWARD)
def test_projector_forward(change, error, match, into, wrapped):
    out = zeros(20, 5)
    options = {"out": out, "rows": torch.arange(8)} if into else {}
    with torch.no_grad():
        refused(projector(wrapped), error, match, *change, **options)
    assert not out.any()


def test_forward_of_the_children():
    fusion, merging = stf_kernels.MultiBlockTokenFusion(3, 8, skip_tokens=1), stf_kernels.SpatialTokenFusion(8, 5)
    refused(fusion, ValueError, r"blocks.*3.*num_blocks.*2", BLOCKS[:2])
    refused(merging, ValueError, r"grid.*15.*square", zeros(2, 15, 8))
    refused(merging, ValueError, r"x.*8 channels.*\(2, 16, 7\)", zeros(2, 16, 7))
    refused(merging, TypeError, r"weight.*float64.*float32", zeros(2, 16, 8).double())


TARGETS = {
    "rows missing": ({"rows": None}, ValueError, r"rows.*together"),
    "out missing": ({"out": None}, ValueError, r"out.*together"),
    "out no tensor": ({"out": [0.0]}, ValueError, r"out.*\[R, 5\].*list"),
    "out of three axes": ({"out": zeros(1, 20, 5)}, ValueError, r"out.*\[R, 5\].*\(1, 20, 5\)"),
    "out too wide": ({"out": zeros(20, 6)}, ValueError, r"out.*\[R, 5\].*\(20, 6\)"),
    "out transposed": ({"out": zeros(5, 20).t()}, ValueError, r"out.*contiguous last axis.*\(1, 20\)"),
    "out of rows that overlap": ({"out": zeros(1, 5).expand(20, 5)}, ValueError, r"out.*do not overlap.*\(0, 1\)"),
    "out dtype": ({"out": zeros(20, 5).half()}, TypeError, r"out.*float32.*float16"),
    "out device": ({"out": zeros(20, 5, device="meta")}, ValueError, r"out.*device.*cpu.*meta"),
    "rows int32": ({"rows": torch.arange(8).int()}, ValueError, r"rows.*int64 \[8\].*int32"),
    "rows too few": ({"rows": torch.arange(7)}, ValueError, r"rows.*\[8\].*\(7,\)"),
    "rows of two axes": ({"rows": torch.arange(8).view(2, 4)}, ValueError, r"rows.*\[8\].*\(2, 4\)"),
    "rows a list": ({"rows": list(range(8))}, ValueError, r"rows.*int64 \[8\].*list"),
    "rows past the end": ({"rows": torch.arange(13, 21)}, ValueError, r"rows.*0 to 19.*20"),
    "rows below zero": ({"rows": torch.arange(-1, 7)}, ValueError, r"rows.*0 to 19.*-1"),
    "rows elsewhere": ({"rows": torch.arange(8, device="meta")}, ValueError, r"rows.*device.*cpu.*meta"),
}


@WRAPPED
@each(TARGETS)
def test_targets(change, error, match, wrapped):
    module = projector(wrapped).requires_grad_(False)
    arguments = {"out": zeros(20, 5), "rows": torch.arange(8)}
    module(BLOCKS, **arguments)  # accepted as it is
    arguments["out"].zero_()
    refused(module, error, match, BLOCKS, **arguments | change)
    assert not arguments["out"].any()


@pytest.mark.parametrize(
    ("layer", "replacement", "named"),
    [
        ("stf.linear_2", nn.Linear(100, 5), r"stf\.linear_2\.weight.*128"),
        ("mbtf.linear_1", nn.Linear(20, 32), r"mbtf\.linear_1\.weight.*24"),
        ("mbtf.linear_2", nn.Linear(32, 9), r"stf\.linear_1\.weight.*36"),
        ("stf.linear_1.bias", nn.Parameter(zeros(1)), r"stf\.linear_1\.bias"),
    ],
)
def test_a_replaced_layer_that_does_not_fit(layer, replacement, named):
    module = projector()
    parent, _, name = layer.rpartition(".")
    setattr(module.get_submodule(parent), name, replacement)
    refused(module, ValueError, named, BLOCKS)
