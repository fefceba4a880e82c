"""If this fails, a wrong argument of the two functions is computed with, or refused in words that do not help.

Every message names the argument (or dtype, or device), what was expected and what came.
"""

import numpy as np
import pytest
import torch
from support.recording import Recorder
from torch import zeros

import stf_kernels
from stf_kernels.ops import operators

M, B, T, C, N = 3, 2, 6, 8, 5
BLOCK, WEIGHT = zeros(B, T, C), zeros(N, M * C)
X, GRID = zeros(B, 24, C), (4, 6)
GOOD_CONCAT = {"blocks": [BLOCK] * M, "weight": WEIGHT}
GOOD_MERGE = {"x": X, "weight": zeros(N, 32), "grid": GRID, "merge_size": 2}


def as_third(block):
    return {"blocks": [BLOCK, BLOCK, block]}


CONCAT = {
    "no blocks": ({"blocks": []}, ValueError, r"blocks.*at least one.*none"),
    "a tensor": ({"blocks": zeros(M, B, T, C)}, TypeError, r"blocks.*list.*Tensor"),
    "a generator": ({"blocks": (BLOCK for _ in range(M))}, TypeError, r"blocks.*list.*generator"),
    "None": ({"blocks": None}, TypeError, r"blocks.*list.*NoneType"),
    "a block that is no tensor": (as_third([1.0]), TypeError, r"blocks\[2\].*tensor.*list"),
    "thirty-three": ({"blocks": [BLOCK] * 33}, ValueError, r"blocks.*32.*33"),
    "two axes": ({"blocks": [zeros(T, C)] * M}, ValueError, r"blocks\[0\].*\[B, T, C\].*\(6, 8\)"),
    "other tokens": (as_third(zeros(B, 5, C)), ValueError, r"blocks\[2\].*\(2, 6, 8\).*\(2, 5, 8\)"),
    "other batch": (as_third(zeros(1, T, C)), ValueError, r"blocks\[2\].*\(2, 6, 8\).*\(1, 6, 8\)"),
    "other channels": (as_third(zeros(B, T, 4)), ValueError, r"blocks\[2\].*\(2, 6, 8\).*\(2, 6, 4\)"),
    "other dtype": (as_third(BLOCK.half()), TypeError, r"blocks\[2\].*float32.*float16"),
    "other device": (as_third(BLOCK.to("meta")), ValueError, r"blocks\[2\].*device.*cpu.*meta"),
    "integers": ({"blocks": [BLOCK.long()] * M}, TypeError, r"blocks\[0\].*float16.*float64.*int64"),
    "booleans": ({"blocks": [BLOCK.bool()] * M}, TypeError, r"blocks\[0\].*dtype.*bool"),
    "complex": ({"blocks": [BLOCK.cfloat()] * M}, TypeError, r"blocks\[0\].*dtype.*complex64"),
    "weight too narrow": ({"weight": zeros(N, 23)}, ValueError, r"weight.*\[N, 24\].*3 blocks of 8.*\(5, 23\)"),
    "weight of one axis": ({"weight": zeros(24)}, ValueError, r"weight.*\[N, 24\].*\(24,\)"),
    "weight transposed": ({"weight": WEIGHT.t()}, ValueError, r"weight.*\[N, 24\].*\(24, 5\)"),
    "weight of another dtype": ({"weight": WEIGHT.half()}, TypeError, r"weight.*float32.*float16"),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, r"weight.*device.*cpu.*meta"),
    "weight a list": ({"weight": WEIGHT.tolist()}, TypeError, r"weight.*tensor.*list"),
    "bias too long": ({"bias": zeros(6)}, ValueError, r"bias.*\(5,\).*\(6,\)"),
    "bias of two axes": ({"bias": zeros(1, 5)}, ValueError, r"bias.*\(5,\).*\(1, 5\)"),
    "bias of another dtype": ({"bias": zeros(5).double()}, TypeError, r"bias.*float32.*float64"),
    "bias elsewhere": ({"bias": zeros(5, device="meta")}, ValueError, r"bias.*device.*cpu.*meta"),
    "bias a number": ({"bias": 0.0}, TypeError, r"bias.*tensor.*float"),
    "activation": ({"activation": "relu"}, ValueError, r"activation.*gelu.*silu.*'relu'"),
    "activation object": ({"activation": torch.nn.GELU()}, ValueError, r"activation.*gelu.*GELU"),
    "activation in capitals": ({"activation": "GELU"}, ValueError, r"activation.*'GELU'"),
    "activation an array": ({"activation": np.array(["gelu"])}, ValueError, r"activation.*gelu.*array"),
    "skip below zero": ({"skip_tokens": -1}, ValueError, r"skip_tokens.*at least 0.*-1"),
    "skip too many": ({"skip_tokens": 7}, ValueError, r"skip_tokens.*6.*7"),
    "skip a float": ({"skip_tokens": 1.0}, TypeError, r"skip_tokens.*int.*1\.0"),
    "skip a truth value": ({"skip_tokens": True}, TypeError, r"skip_tokens.*int.*True"),
}

MERGE = {
    "x no tensor": ({"x": [1.0]}, TypeError, r"x: .*tensor.*list"),
    "x of two axes": ({"x": zeros(24, C)}, ValueError, r"x: .*\[B, T, C\].*\(24, 8\)"),
    "x of integers": ({"x": X.int()}, TypeError, r"x: .*dtype.*int32"),
    "tokens": ({"x": zeros(B, 25, C)}, ValueError, r"grid.*25.*\(4, 6\).*24"),
    "grid of other tokens": ({"grid": (4, 5)}, ValueError, r"grid.*24.*\(4, 5\).*20"),
    "skip leaves another count": ({"skip_tokens": 1}, ValueError, r"grid.*23.*24"),
    "height": ({"grid": (3, 8)}, ValueError, r"grid.*\(3, 8\).*merge_size=2.*truncate=True"),
    "width": ({"grid": (8, 3)}, ValueError, r"grid.*\(8, 3\).*merge_size=2.*truncate=True"),
    "one side": ({"grid": (24,)}, TypeError, r"grid.*\(H, W\).*\(24,\)"),
    "a number": ({"grid": 24}, TypeError, r"grid.*\(H, W\).*24"),
    "floats": ({"grid": (4.0, 6.0)}, TypeError, r"grid H.*int.*4\.0"),
    "zero side": ({"grid": (0, 6), "x": X[:, :0]}, ValueError, r"grid H.*at least 1.*0"),
    "below zero": ({"grid": (-4, -6)}, ValueError, r"grid H.*at least 1.*-4"),
    "text": ({"grid": "46"}, TypeError, r"grid.*\(H, W\).*'46'"),
    "no grid": ({"grid": None}, TypeError, r"grid.*\(H, W\).*None"),
    "truncate a word": ({"truncate": "False"}, TypeError, r"truncate.*True or False.*'False'"),
    "merge size zero": ({"merge_size": 0}, ValueError, r"merge_size.*1.*0"),
    "merge size a float": ({"merge_size": 2.0}, TypeError, r"merge_size.*int.*2\.0"),
    "merge size too large": ({"merge_size": 17}, ValueError, r"merge_size.*16.*17"),
    "order": ({"feature_order": "unfold"}, ValueError, r"feature_order.*patch_major.*channel_major.*'unfold'"),
    "weight": ({"weight": zeros(N, 31)}, ValueError, r"weight.*\[N, 32\].*2x2.*8.*\(5, 31\)"),
    "weight of a concat": ({"weight": zeros(N, C)}, ValueError, r"weight.*\[N, 32\].*\(5, 8\)"),
    "weight dtype": ({"weight": zeros(N, 32).bfloat16()}, TypeError, r"weight.*float32.*bfloat16"),
    "channel-major weight": (
        {"weight": zeros(N, 30), "feature_order": "channel_major"},
        ValueError,
        r"weight.*\[N, 32\].*\(5, 30\)",
    ),
    "bias": ({"bias": zeros(N + 1)}, ValueError, r"bias.*\(5,\).*\(6,\)"),
    "activation": ({"activation": "gelu_new"}, ValueError, r"activation.*gelu_tanh.*'gelu_new'"),
}


def refused(function, arguments, error, match):
    with Recorder() as recorder, pytest.raises(error, match=match):
        function(**arguments)
    assert recorder.matrix_products() == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("change", "error", "match"), CONCAT.values(), ids=CONCAT)
def test_concat_linear(change, error, match, autocast):
    if autocast and ("dtype" in match or "float" in match.split(".*")[-1]):
        return  # autocast makes the dtypes agree, as it does for nn.Linear
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        refused(stf_kernels.concat_linear, GOOD_CONCAT | change, error, match)


@pytest.mark.parametrize(("change", "error", "match"), MERGE.values(), ids=MERGE)
def test_spatial_merge_linear(change, error, match):
    refused(stf_kernels.spatial_merge_linear, GOOD_MERGE | change, error, match)


def test_the_unchanged_arguments_are_accepted():
    """Else every refusal above proves nothing."""
    stf_kernels.concat_linear(**GOOD_CONCAT)
    for grid in (GRID, list(GRID), torch.Size(GRID)):
        stf_kernels.spatial_merge_linear(**GOOD_MERGE | {"grid": grid})


def test_several_blocks_are_not_merged():
    """The kernel and torch.func would order the columns otherwise, and a gradient has no shape to take."""
    blocks, weight = [torch.randn(1, 16, 4)] * 2, torch.randn(3, 32)
    with pytest.raises(ValueError, match="blocks: a stage that merges on load takes one block, got 2"):
        operators.spatial_merge_linear(blocks, [weight], [], None, 0, 2, 4, 4)
