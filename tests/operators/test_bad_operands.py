"""If this fails, a wrong argument of the two functions is computed with, or refused in words that do not help.

Every message names the argument (or dtype, or device), what was expected and what came.
"""

import numpy as np
import pytest
import torch
from support.recording import Recorder

import stf_kernels

M, B, T, C, N = 3, 2, 6, 8, 5


def blocks(*, dtype=torch.float32, device="cpu"):
    return [torch.zeros(B, T, C, dtype=dtype, device=device) for _ in range(M)]


def weight(n=N, k=M * C, **options):
    return torch.zeros(n, k, **options)


def with_last(block):
    return [*blocks()[:-1], block]


CONCAT = {
    "no blocks": (lambda: {"blocks": []}, ValueError, r"blocks.*at least one.*none"),
    "a tensor": (lambda: {"blocks": torch.zeros(M, B, T, C)}, TypeError, r"blocks.*list.*Tensor"),
    "a generator": (lambda: {"blocks": (b for b in blocks())}, TypeError, r"blocks.*list.*generator"),
    "None": (lambda: {"blocks": None}, TypeError, r"blocks.*list.*NoneType"),
    "a block that is no tensor": (lambda: {"blocks": with_last([1.0])}, TypeError, r"blocks\[2\].*tensor.*list"),
    "thirty-three": (lambda: {"blocks": blocks() * 11}, ValueError, r"blocks.*32.*33"),
    "two axes": (lambda: {"blocks": [torch.zeros(T, C)] * M}, ValueError, r"blocks\[0\].*\[B, T, C\].*\(6, 8\)"),
    "other tokens": (
        lambda: {"blocks": with_last(torch.zeros(B, 5, C))}, ValueError,
        r"blocks\[2\].*\(2, 6, 8\).*\(2, 5, 8\)",
    ),
    "other batch": (
        lambda: {"blocks": with_last(torch.zeros(1, T, C))}, ValueError,
        r"blocks\[2\].*\(2, 6, 8\).*\(1, 6, 8\)",
    ),
    "other channels": (
        lambda: {"blocks": with_last(torch.zeros(B, T, 4))}, ValueError,
        r"blocks\[2\].*\(2, 6, 8\).*\(2, 6, 4\)",
    ),
    "other dtype": (
        lambda: {"blocks": with_last(torch.zeros(B, T, C).half())}, TypeError,
        r"blocks\[2\].*float32.*float16",
    ),
    "other device": (
        lambda: {"blocks": with_last(torch.zeros(B, T, C, device="meta"))},
        ValueError, r"blocks\[2\].*device.*cpu.*meta",
    ),
    "integers": (
        lambda: {"blocks": blocks(dtype=torch.int64), "weight": weight(dtype=torch.int64)},
        TypeError, r"blocks\[0\].*float16.*float64.*int64",
    ),
    "booleans": (lambda: {"blocks": blocks(dtype=torch.bool)}, TypeError, r"blocks\[0\].*dtype.*bool"),
    "complex": (lambda: {"blocks": blocks(dtype=torch.complex64)}, TypeError, r"blocks\[0\].*dtype.*complex64"),
    "weight too narrow": (lambda: {"weight": weight(k=23)}, ValueError, r"weight.*\[N, 24\].*3 blocks of 8.*\(5, 23\)"),
    "weight of one axis": (lambda: {"weight": torch.zeros(24)}, ValueError, r"weight.*\[N, 24\].*\(24,\)"),
    "weight transposed": (lambda: {"weight": weight().t()}, ValueError, r"weight.*\[N, 24\].*\(24, 5\)"),
    "weight of another dtype": (lambda: {"weight": weight().half()}, TypeError, r"weight.*float32.*float16"),
    "weight elsewhere": (lambda: {"weight": weight(device="meta")}, ValueError, r"weight.*device.*cpu.*meta"),
    "weight a list": (lambda: {"weight": [[0.0] * 24] * 5}, TypeError, r"weight.*tensor.*list"),
    "bias too long": (lambda: {"bias": torch.zeros(6)}, ValueError, r"bias.*\(5,\).*\(6,\)"),
    "bias of two axes": (lambda: {"bias": torch.zeros(1, 5)}, ValueError, r"bias.*\(5,\).*\(1, 5\)"),
    "bias of another dtype": (lambda: {"bias": torch.zeros(5).double()}, TypeError, r"bias.*float32.*float64"),
    "bias elsewhere": (lambda: {"bias": torch.zeros(5, device="meta")}, ValueError, r"bias.*device.*cpu.*meta"),
    "bias a number": (lambda: {"bias": 0.0}, TypeError, r"bias.*tensor.*float"),
    "activation": (lambda: {"activation": "relu"}, ValueError, r"activation.*gelu.*silu.*'relu'"),
    "activation object": (lambda: {"activation": torch.nn.GELU()}, ValueError, r"activation.*gelu.*GELU"),
    "activation in capitals": (lambda: {"activation": "GELU"}, ValueError, r"activation.*'GELU'"),
    "activation an array": (lambda: {"activation": np.array(["gelu"])}, ValueError, r"activation.*gelu.*array"),
    "skip below zero": (lambda: {"skip_tokens": -1}, ValueError, r"skip_tokens.*at least 0.*-1"),
    "skip too many": (lambda: {"skip_tokens": 7}, ValueError, r"skip_tokens.*6.*7"),
    "skip a float": (lambda: {"skip_tokens": 1.0}, TypeError, r"skip_tokens.*int.*1\.0"),
    "skip a truth value": (lambda: {"skip_tokens": True}, TypeError, r"skip_tokens.*int.*True"),
}  # fmt: skip

R, GRID = 2, (4, 6)
X = torch.zeros(B, 24, C)

MERGE = {
    "x no tensor": (lambda: {"x": [1.0]}, TypeError, r"x: .*tensor.*list"),
    "x of two axes": (lambda: {"x": torch.zeros(24, C)}, ValueError, r"x: .*\[B, T, C\].*\(24, 8\)"),
    "x of integers": (lambda: {"x": X.int()}, TypeError, r"x: .*dtype.*int32"),
    "tokens": (lambda: {"x": torch.zeros(B, 25, C)}, ValueError, r"grid.*25.*\(4, 6\).*24"),
    "grid of other tokens": (lambda: {"grid": (4, 5)}, ValueError, r"grid.*24.*\(4, 5\).*20"),
    "skip leaves another count": (lambda: {"skip_tokens": 1}, ValueError, r"grid.*23.*24"),
    "height": (lambda: {"grid": (3, 8)}, ValueError, r"grid.*\(3, 8\).*merge_size=2.*truncate=True"),
    "width": (lambda: {"grid": (8, 3)}, ValueError, r"grid.*\(8, 3\).*merge_size=2.*truncate=True"),
    "one side": (lambda: {"grid": (24,)}, TypeError, r"grid.*\(H, W\).*\(24,\)"),
    "a number": (lambda: {"grid": 24}, TypeError, r"grid.*\(H, W\).*24"),
    "floats": (lambda: {"grid": (4.0, 6.0)}, TypeError, r"grid H.*int.*4\.0"),
    "zero side": (lambda: {"grid": (0, 6), "x": X[:, :0]}, ValueError, r"grid H.*at least 1.*0"),
    "below zero": (lambda: {"grid": (-4, -6)}, ValueError, r"grid H.*at least 1.*-4"),
    "text": (lambda: {"grid": "46"}, TypeError, r"grid.*\(H, W\).*'46'"),
    "no grid": (lambda: {"grid": None}, TypeError, r"grid.*\(H, W\).*None"),
    "truncate a word": (lambda: {"truncate": "False"}, TypeError, r"truncate.*True or False.*'False'"),
    "merge size zero": (lambda: {"merge_size": 0}, ValueError, r"merge_size.*1.*0"),
    "merge size a float": (lambda: {"merge_size": 2.0}, TypeError, r"merge_size.*int.*2\.0"),
    "merge size too large": (lambda: {"merge_size": 17}, ValueError, r"merge_size.*16.*17"),
    "order": (lambda: {"feature_order": "unfold"}, ValueError, r"feature_order.*patch_major.*channel_major.*'unfold'"),
    "weight": (lambda: {"weight": torch.zeros(N, 31)}, ValueError, r"weight.*\[N, 32\].*2x2.*8.*\(5, 31\)"),
    "weight of a concat": (lambda: {"weight": torch.zeros(N, C)}, ValueError, r"weight.*\[N, 32\].*\(5, 8\)"),
    "weight dtype": (lambda: {"weight": torch.zeros(N, 32).bfloat16()}, TypeError, r"weight.*float32.*bfloat16"),
    "channel-major weight": (
        lambda: {"weight": torch.zeros(N, 30), "feature_order": "channel_major"},
        ValueError, r"weight.*\[N, 32\].*\(5, 30\)",
    ),
    "bias": (lambda: {"bias": torch.zeros(N + 1)}, ValueError, r"bias.*\(5,\).*\(6,\)"),
    "activation": (lambda: {"activation": "gelu_new"}, ValueError, r"activation.*gelu_tanh.*'gelu_new'"),
}  # fmt: skip


def refused(function, arguments, error, match):
    with Recorder() as recorder, pytest.raises(error, match=match):
        function(**arguments)
    assert recorder.matrix_products() == 0


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("change", "error", "match"), CONCAT.values(), ids=CONCAT)
def test_concat_linear(change, error, match, backend):
    with stf_kernels.use_backend(backend):
        refused(stf_kernels.concat_linear, {"blocks": blocks(), "weight": weight()} | change(), error, match)


@pytest.mark.parametrize(("change", "error", "match"), MERGE.values(), ids=MERGE)
def test_spatial_merge_linear(change, error, match):
    arguments = {"x": X, "weight": torch.zeros(N, 32), "grid": GRID, "merge_size": R}
    refused(stf_kernels.spatial_merge_linear, arguments | change(), error, match)


def test_the_unchanged_arguments_are_accepted():
    """Else every refusal above proves nothing."""
    stf_kernels.concat_linear(blocks(), weight())
    stf_kernels.spatial_merge_linear(X, torch.zeros(N, 32), grid=GRID, merge_size=R)
    stf_kernels.spatial_merge_linear(X, torch.zeros(N, 32), grid=list(GRID))
    stf_kernels.spatial_merge_linear(X, torch.zeros(N, 32), grid=torch.Size(GRID))


@pytest.mark.parametrize(("change", "error", "match"), CONCAT.values(), ids=CONCAT)
def test_under_autocast_too(change, error, match):
    if "dtype" in match or "float" in match.split(".*")[-1]:
        return  # autocast makes the dtypes agree, as it does for nn.Linear
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((TypeError, ValueError), match=match):
        stf_kernels.concat_linear(**{"blocks": blocks(), "weight": weight()} | change())
