"""If this fails, a module takes a wrong argument, or refuses it without saying which and why, or after writing."""

import pytest
import torch
from support.recording import Recorder

import stf_kernels

CONSTRUCTORS = [
    ("MultiBlockTokenFusion", (0, 8), {}, ValueError, r"num_blocks.*1 to 32.*0"),
    ("MultiBlockTokenFusion", (33, 8), {}, ValueError, r"num_blocks.*1 to 32.*33"),
    ("MultiBlockTokenFusion", (2.0, 8), {}, TypeError, r"num_blocks.*int.*2\.0"),
    ("MultiBlockTokenFusion", (2, 0), {}, ValueError, r"dim.*at least 1.*0"),
    ("MultiBlockTokenFusion", (2, 8), {"hidden_dim": 0}, ValueError, r"hidden_dim.*0"),
    ("MultiBlockTokenFusion", (2, 8), {"out_dim": -1}, ValueError, r"out_dim.*-1"),
    ("MultiBlockTokenFusion", (2, 8), {"activation": "relu"}, ValueError, r"activation.*'relu'"),
    ("MultiBlockTokenFusion", (2, 8), {"skip_tokens": -1}, ValueError, r"skip_tokens.*-1"),
    ("SpatialTokenFusion", (8, 5), {"merge_size": 0}, ValueError, r"merge_size.*0"),
    ("SpatialTokenFusion", (8, 5), {"merge_size": "2"}, TypeError, r"merge_size.*'2'"),
    ("SpatialTokenFusion", (8, 5), {"activation": "Gelu"}, ValueError, r"activation.*'Gelu'"),
    ("CompactTokenProjector", (2, 8, 5), {"mbtf": False}, ValueError, r"num_blocks.*1.*mbtf=False.*2"),
    ("CompactTokenProjector", (0, 8, 5), {}, ValueError, r"num_blocks.*0"),
    ("CompactTokenProjector", (2, 8, 5), {"skip_tokens": -2}, ValueError, r"skip_tokens.*-2"),
    ("CompactTokenProjector", (2, 8, 5), {"stf_hidden_dim": 0}, ValueError, r"stf_hidden_dim.*0"),
    ("CompactTokenProjector", (2, 8, 5), {"mbtf_hidden_dim": "2"}, TypeError, r"mbtf_hidden_dim.*int.*'2'"),
    ("CompactTokenProjector", (2, 8, 0), {}, ValueError, r"out_dim.*0"),
    ("CompactTokenProjector", (1, 8, 5), {"mbtf": "no"}, TypeError, r"mbtf.*True or False.*'no'"),
    ("CompactTokenProjector", (2, 8, 5), {"truncate": "False"}, TypeError, r"truncate.*'False'"),
    ("SpatialTokenFusion", (8, 5), {"truncate": None}, TypeError, r"truncate.*None"),
    ("MultiBlockTokenFusion", (2, 8), {"bias": 1}, TypeError, r"bias.*True or False.*1"),
    ("MultiBlockTokenFusion", (2, 8), {"dtype": torch.int64}, TypeError, r"dtype.*bfloat16.*int64"),
    ("MultiBlockTokenFusion", (2, 8), {"dtype": torch.float8_e4m3fn}, TypeError, r"dtype.*float8"),
    ("MultiBlockTokenFusion", (2, 8), {"dtype": "bfloat16"}, TypeError, r"dtype.*'bfloat16'"),
]


@pytest.mark.parametrize(("name", "args", "options", "error", "match"), CONSTRUCTORS)
def test_constructors(name, args, options, error, match):
    with pytest.raises(error, match=match):
        getattr(stf_kernels, name)(*args, **options)


def states(count=3, batch=2, tokens=17, dim=8, dtype=torch.float32):
    return [torch.zeros(batch, tokens, dim, dtype=dtype) for _ in range(count)]


FORWARD = {
    "fewer blocks": (lambda: (states(2),), ValueError, r"blocks.*3.*num_blocks.*2"),
    "more blocks": (lambda: (states(4),), ValueError, r"blocks.*3.*num_blocks.*4"),
    "no blocks": (lambda: ([],), ValueError, r"blocks.*none"),
    "a tensor": (lambda: (torch.zeros(3, 2, 17, 8),), TypeError, r"blocks.*list.*Tensor"),
    "channels": (lambda: (states(dim=9),), ValueError, r"blocks\[0\].*8 channels.*\(2, 17, 9\)"),
    "unlike shapes": (
        lambda: ([*states(2), *states(1, tokens=16)],), ValueError,
        r"blocks\[2\].*\(2, 17, 8\).*\(2, 16, 8\)",
    ),
    "unlike dtypes": (
        lambda: ([*states(2), *states(1, dtype=torch.float16)],), TypeError,
        r"blocks\[2\].*float32.*float16",
    ),
    "dtype of the weights": (lambda: (states(dtype=torch.bfloat16),), TypeError, r"(out|weight).*bfloat16.*float32"),
    "integers": (lambda: (states(dtype=torch.int64),), TypeError, r"blocks\[0\].*dtype.*int64"),
    "too few tokens": (lambda: (states(tokens=0),), ValueError, r"skip_tokens.*0.*1"),
    "no square": (lambda: (states(tokens=13),), ValueError, r"grid.*12.*square.*\(H, W\)"),
    "wrong grid": (lambda: (states(), (4, 5)), ValueError, r"grid.*16.*\(4, 5\).*20"),
    "odd grid": (lambda: (states(tokens=16), (3, 5)), ValueError, r"grid.*\(3, 5\).*merge_size=2.*truncate=True"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "match"), FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "hooked"])
def test_projector_forward(change, error, match, wrapped):
    module = stf_kernels.CompactTokenProjector(3, 8, 5, skip_tokens=1)
    if wrapped:
        module.mbtf.linear_2.register_forward_hook(lambda *_: None)
    out = torch.zeros(20, 5)
    with Recorder() as recorder, pytest.raises(error, match=match), torch.no_grad():
        module(*change(), out=out, rows=torch.arange(8))
    assert recorder.matrix_products() == 0
    assert not out.any()


@pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "hooked"])
def test_blocks_of_another_dtype_than_the_weights(wrapped):
    module = stf_kernels.CompactTokenProjector(3, 8, 5, skip_tokens=1)
    if wrapped:
        module.mbtf.linear_2.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"weight.*dtype.*float16.*float32"):
        module(states(dtype=torch.float16))


@pytest.mark.parametrize(
    ("x", "grid", "error", "match"),
    [
        (torch.zeros(2, 15, 8), None, ValueError, r"grid.*15.*square"),
        (torch.zeros(2, 16, 7), None, ValueError, r"x.*8 channels.*\(2, 16, 7\)"),
        (torch.zeros(16, 8), None, ValueError, r"x.*\[B, T, C\].*\(16, 8\)"),
        (torch.zeros(2, 9, 8), None, ValueError, r"grid.*\(3, 3\).*merge_size=2.*truncate"),
        ([torch.zeros(2, 16, 8)], None, TypeError, r"x.*tensor.*list"),
        (torch.zeros(2, 16, 8), (2, 7), ValueError, r"grid.*16.*\(2, 7\)"),
        (torch.zeros(2, 16, 8, dtype=torch.int32), None, TypeError, r"x.*dtype.*int32"),
        (torch.zeros(2, 16, 8, dtype=torch.float64), None, TypeError, r"weight.*float64.*float32"),
    ],
    ids=str,
)
def test_spatial_token_fusion_forward(x, grid, error, match):
    with Recorder() as recorder, pytest.raises(error, match=match):
        stf_kernels.SpatialTokenFusion(8, 5)(x, grid)
    assert recorder.matrix_products() == 0


TARGETS = {
    "rows missing": (lambda: {"rows": None}, ValueError, r"rows.*together"),
    "out missing": (lambda: {"out": None}, ValueError, r"out.*together"),
    "out no tensor": (lambda: {"out": [0.0]}, ValueError, r"out.*\[R, 5\].*list"),
    "out of three axes": (lambda: {"out": torch.zeros(1, 20, 5)}, ValueError, r"out.*\[R, 5\].*\(1, 20, 5\)"),
    "out too wide": (lambda: {"out": torch.zeros(20, 6)}, ValueError, r"out.*\[R, 5\].*\(20, 6\)"),
    "out transposed": (lambda: {"out": torch.zeros(5, 20).t()}, ValueError, r"out.*contiguous last axis.*\(1, 20\)"),
    "out dtype": (lambda: {"out": torch.zeros(20, 5).half()}, TypeError, r"out.*float32.*float16"),
    "out device": (lambda: {"out": torch.zeros(20, 5, device="meta")}, ValueError, r"out.*device.*cpu.*meta"),
    "rows int32": (lambda: {"rows": torch.arange(8).int()}, ValueError, r"rows.*int64 \[8\].*int32"),
    "rows a mask": (lambda: {"rows": torch.ones(20, dtype=torch.bool)}, ValueError, r"rows.*int64 \[8\].*bool"),
    "rows too few": (lambda: {"rows": torch.arange(7)}, ValueError, r"rows.*\[8\].*\(7,\)"),
    "rows of two axes": (lambda: {"rows": torch.arange(8).view(2, 4)}, ValueError, r"rows.*\[8\].*\(2, 4\)"),
    "rows a list": (lambda: {"rows": list(range(8))}, ValueError, r"rows.*int64 \[8\].*list"),
    "rows past the end": (lambda: {"rows": torch.arange(13, 21)}, ValueError, r"rows.*0 to 19.*20"),
    "rows below zero": (lambda: {"rows": torch.arange(-1, 7)}, ValueError, r"rows.*0 to 19.*-1"),
    "rows elsewhere": (lambda: {"rows": torch.arange(8, device="meta")}, ValueError, r"rows.*device.*cpu.*meta"),
}


@pytest.mark.parametrize(("change", "error", "match"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "hooked"])
def test_targets(change, error, match, wrapped):
    module = stf_kernels.CompactTokenProjector(3, 8, 5, skip_tokens=1).requires_grad_(False)
    if wrapped:
        module.mbtf.linear_2.register_forward_hook(lambda *_: None)
    arguments = {"out": torch.zeros(20, 5), "rows": torch.arange(8)}
    module(states(), **arguments)  # accepted as it is
    arguments["out"].zero_()
    changed = arguments | change()
    with Recorder() as recorder, pytest.raises(error, match=match):
        module(states(), **changed)
    assert recorder.matrix_products() == 0
    assert not arguments["out"].any()
