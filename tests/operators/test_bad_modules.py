"""If this fails, a module takes a wrong argument, or refuses it without saying which and why, or after writing."""

import pytest
import torch
from support.recording import Recorder
from torch import zeros

import stf_kernels

WRAPPED = pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "hooked"])

CONSTRUCTORS = [
    ("MultiBlockTokenFusion", (0, 8), {}, ValueError, r"num_blocks.*1 to 32.*0"),
    ("MultiBlockTokenFusion", (33, 8), {}, ValueError, r"num_blocks.*1 to 32.*33"),
    ("MultiBlockTokenFusion", (2.0, 8), {}, TypeError, r"num_blocks.*int.*2\.0"),
    ("MultiBlockTokenFusion", (2, 0), {}, ValueError, r"dim.*at least 1.*0"),
    ("MultiBlockTokenFusion", (2, 8), {"hidden_dim": 0}, ValueError, r"hidden_dim.*0"),
    ("MultiBlockTokenFusion", (2, 8), {"out_dim": -1}, ValueError, r"out_dim.*-1"),
    ("MultiBlockTokenFusion", (2, 8), {"activation": "relu"}, ValueError, r"activation.*'relu'"),
    ("MultiBlockTokenFusion", (2, 8), {"skip_tokens": -1}, ValueError, r"skip_tokens.*-1"),
    ("MultiBlockTokenFusion", (2, 8), {"bias": 1}, TypeError, r"bias.*True or False.*1"),
    ("MultiBlockTokenFusion", (2, 8), {"dtype": torch.int64}, TypeError, r"dtype.*bfloat16.*int64"),
    ("MultiBlockTokenFusion", (2, 8), {"dtype": torch.float8_e4m3fn}, TypeError, r"dtype.*float8"),
    ("MultiBlockTokenFusion", (2, 8), {"dtype": "bfloat16"}, TypeError, r"dtype.*'bfloat16'"),
    ("SpatialTokenFusion", (8, 5), {"merge_size": 0}, ValueError, r"merge_size.*0"),
    ("SpatialTokenFusion", (8, 5), {"merge_size": "2"}, TypeError, r"merge_size.*'2'"),
    ("SpatialTokenFusion", (8, 5), {"activation": "Gelu"}, ValueError, r"activation.*'Gelu'"),
    ("SpatialTokenFusion", (8, 5), {"truncate": None}, TypeError, r"truncate.*None"),
    ("CompactTokenProjector", (2, 8, 5), {"mbtf": False}, ValueError, r"num_blocks.*1.*mbtf=False.*2"),
    ("CompactTokenProjector", (0, 8, 5), {}, ValueError, r"num_blocks.*0"),
    ("CompactTokenProjector", (2, 8, 5), {"skip_tokens": -2}, ValueError, r"skip_tokens.*-2"),
    ("CompactTokenProjector", (2, 8, 5), {"stf_hidden_dim": 0}, ValueError, r"stf_hidden_dim.*0"),
    ("CompactTokenProjector", (2, 8, 5), {"mbtf_hidden_dim": "2"}, TypeError, r"mbtf_hidden_dim.*int.*'2'"),
    ("CompactTokenProjector", (2, 8, 0), {}, ValueError, r"out_dim.*0"),
    ("CompactTokenProjector", (1, 8, 5), {"mbtf": "no"}, TypeError, r"mbtf.*True or False.*'no'"),
    ("CompactTokenProjector", (2, 8, 5), {"truncate": "False"}, TypeError, r"truncate.*'False'"),
]


@pytest.mark.parametrize(("name", "args", "options", "error", "match"), CONSTRUCTORS)
def test_constructors(name, args, options, error, match):
    with pytest.raises(error, match=match):
        getattr(stf_kernels, name)(*args, **options)


BLOCK = zeros(2, 17, 8)
BLOCKS = [BLOCK] * 3


def projector(wrapped=False):
    module = stf_kernels.CompactTokenProjector(3, 8, 5, skip_tokens=1)
    if wrapped:
        module.mbtf.linear_2.register_forward_hook(lambda *_: None)
    return module


FORWARD = {
    "fewer blocks": ((BLOCKS[:2],), ValueError, r"blocks.*3.*num_blocks.*2"),
    "more blocks": (([*BLOCKS, BLOCK],), ValueError, r"blocks.*3.*num_blocks.*4"),
    "no blocks": (([],), ValueError, r"blocks.*none"),
    "a tensor": ((zeros(3, 2, 17, 8),), TypeError, r"blocks.*list.*Tensor"),
    "channels": (([zeros(2, 17, 9)] * 3,), ValueError, r"blocks\[0\].*8 channels.*\(2, 17, 9\)"),
    "unlike shapes": (([BLOCK, BLOCK, BLOCK[:, 1:]],), ValueError, r"blocks\[2\].*\(2, 17, 8\).*\(2, 16, 8\)"),
    "unlike dtypes": (([BLOCK, BLOCK, BLOCK.half()],), TypeError, r"blocks\[2\].*float32.*float16"),
    "dtype of the weights": (([BLOCK.bfloat16()] * 3,), TypeError, r"(out|weight).*bfloat16.*float32"),
    "integers": (([BLOCK.long()] * 3,), TypeError, r"blocks\[0\].*dtype.*int64"),
    "too few tokens": (([BLOCK[:, :0]] * 3,), ValueError, r"skip_tokens.*0.*1"),
    "no square": (([BLOCK[:, :13]] * 3,), ValueError, r"grid.*12.*square.*\(H, W\)"),
    "wrong grid": ((BLOCKS, (4, 5)), ValueError, r"grid.*16.*\(4, 5\).*20"),
    "odd grid": (([BLOCK[:, :16]] * 3, (3, 5)), ValueError, r"grid.*\(3, 5\).*merge_size=2.*truncate=True"),
}


@WRAPPED
@pytest.mark.parametrize("into", [False, True], ids=["returned", "into-out"])
@pytest.mark.parametrize(("arguments", "error", "match"), FORWARD.values(), ids=FORWARD)
def test_projector_forward(arguments, error, match, into, wrapped):
    out = zeros(20, 5)
    options = {"out": out, "rows": torch.arange(8)} if into else {}
    with Recorder() as recorder, pytest.raises(error, match=match), torch.no_grad():
        projector(wrapped)(*arguments, **options)
    assert recorder.matrix_products() == 0
    assert not out.any()


@pytest.mark.parametrize(
    ("x", "grid", "error", "match"),
    [
        (zeros(2, 15, 8), None, ValueError, r"grid.*15.*square"),
        (zeros(2, 16, 7), None, ValueError, r"x.*8 channels.*\(2, 16, 7\)"),
        (zeros(16, 8), None, ValueError, r"x.*\[B, T, C\].*\(16, 8\)"),
        (zeros(2, 9, 8), None, ValueError, r"grid.*\(3, 3\).*merge_size=2.*truncate"),
        ([zeros(2, 16, 8)], None, TypeError, r"x.*tensor.*list"),
        (zeros(2, 16, 8), (2, 7), ValueError, r"grid.*16.*\(2, 7\)"),
        (zeros(2, 16, 8).int(), None, TypeError, r"x.*dtype.*int32"),
        (zeros(2, 16, 8).double(), None, TypeError, r"weight.*float64.*float32"),
    ],
    ids=str,
)
def test_spatial_token_fusion_forward(x, grid, error, match):
    with Recorder() as recorder, pytest.raises(error, match=match):
        stf_kernels.SpatialTokenFusion(8, 5)(x, grid)
    assert recorder.matrix_products() == 0


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
    "rows a mask": ({"rows": torch.ones(20, dtype=torch.bool)}, ValueError, r"rows.*int64 \[8\].*bool"),
    "rows too few": ({"rows": torch.arange(7)}, ValueError, r"rows.*\[8\].*\(7,\)"),
    "rows of two axes": ({"rows": torch.arange(8).view(2, 4)}, ValueError, r"rows.*\[8\].*\(2, 4\)"),
    "rows a list": ({"rows": list(range(8))}, ValueError, r"rows.*int64 \[8\].*list"),
    "rows past the end": ({"rows": torch.arange(13, 21)}, ValueError, r"rows.*0 to 19.*20"),
    "rows below zero": ({"rows": torch.arange(-1, 7)}, ValueError, r"rows.*0 to 19.*-1"),
    "rows elsewhere": ({"rows": torch.arange(8, device="meta")}, ValueError, r"rows.*device.*cpu.*meta"),
}


@WRAPPED
@pytest.mark.parametrize(("change", "error", "match"), TARGETS.values(), ids=TARGETS)
def test_targets(change, error, match, wrapped):
    module = projector(wrapped).requires_grad_(False)
    arguments = {"out": zeros(20, 5), "rows": torch.arange(8)}
    module(BLOCKS, **arguments)  # accepted as it is
    arguments["out"].zero_()
    with Recorder() as recorder, pytest.raises(error, match=match):
        module(BLOCKS, **arguments | change)
    assert recorder.matrix_products() == 0
    assert not arguments["out"].any()


@pytest.mark.parametrize(
    ("layer", "replacement", "named"),
    [
        ("stf.linear_2", torch.nn.Linear(100, 5), r"stf\.linear_2\.weight.*128"),
        ("mbtf.linear_1", torch.nn.Linear(20, 32), r"mbtf\.linear_1\.weight.*24"),
        ("mbtf.linear_2", torch.nn.Linear(32, 9), r"stf\.linear_1\.weight.*36"),
        ("stf.linear_1.bias", torch.nn.Parameter(zeros(1)), r"stf\.linear_1\.bias"),
    ],
)
def test_a_replaced_layer_that_does_not_fit(layer, replacement, named):
    module = projector()
    parent, _, name = layer.rpartition(".")
    setattr(module.get_submodule(parent), name, replacement)
    with pytest.raises(ValueError, match=named):
        module(BLOCKS)
