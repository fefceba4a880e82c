"""If these fail, `prepare` does not select what a module's calls will ask for, or leaves a trace in the module."""

import pytest
import torch
from torch import nn

import stf_kernels
from stf_kernels import backend

SIZES = {"num_blocks": 2, "dim": 16, "out_dim": 24, "skip_tokens": 1, "dtype": torch.bfloat16}
OF_ONE_IMAGE = [
    ("concat", 576, 64, 32),
    ("linear_merge", 576, 16, 64),
    ("linear", 144, 256, 64),
    ("linear", 144, 24, 256),
]


@pytest.fixture
def served(gpu, monkeypatch):
    monkeypatch.setattr(backend, "triton_serves", lambda device: True)
    return gpu


def test_it_selects_what_the_calls_ask_for(served):
    model = nn.Sequential(nn.Linear(2, 2), stf_kernels.CompactTokenProjector(**SIZES))
    report = stf_kernels.prepare(model, batch_sizes=(1, 4))
    products = [(e["batch"], e["stage"], e["m"], e["n"], e["k"]) for e in report.entries]
    assert products == [(batch, kind, batch * m, n, k) for batch in (1, 4) for kind, m, n, k in OF_ONE_IMAGE]
    assert {(e["module"], e["by"], e["serves"], e["us"]) for e in report.entries} == {
        ("1", "selected", "plain torch", 50.0)
    }
    assert str(report).splitlines()[1].split()[:8] == ["1", "1", "concat", "bfloat16", "576", "64", "32", "plain"]
    selections = served.selections
    assert selections == 8
    again = stf_kernels.prepare(model, batch_sizes=(4,))
    assert {e["by"] for e in again.entries} == {"cache"}
    with torch.no_grad():
        model[1]([torch.randn(1, 577, 16).bfloat16()] * 2)
    assert served.selections == selections


def test_training_touches_no_gradient_and_no_random_numbers(served):
    module = stf_kernels.CompactTokenProjector(**SIZES)
    module.mbtf.requires_grad_(False)
    state = torch.get_rng_state()
    report = stf_kernels.prepare(module, training=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [e["stage"] for e in report.entries] == ["concat", "linear_merge", "linear training", "linear"]


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        (stf_kernels.MultiBlockTokenFusion(3, 8), ["concat", "linear"]),
        (stf_kernels.SpatialTokenFusion(8, 8, merge_size=5), ["merge", "linear"]),
        (stf_kernels.CompactTokenProjector(1, 8, 8, mbtf=False), ["merge", "linear"]),
    ],
    ids=["MultiBlockTokenFusion", "SpatialTokenFusion", "without MBTF"],
)
def test_every_module_can_be_prepared(served, module, stages):
    """A grid that windows do not divide becomes one that they do; dtype is autocast's."""
    report = stf_kernels.prepare(module, dtype=torch.bfloat16, grid=(4, 6))
    assert [(e["stage"], e["dtype"]) for e in report.entries] == [(stage, "bfloat16") for stage in stages]


def test_where_plain_torch_serves_the_report_says_so():
    report = stf_kernels.prepare(nn.ModuleList([stf_kernels.MultiBlockTokenFusion(2, 4)]))
    assert (report.entries, str(report)) == ([], "0: plain torch serves on cpu in torch.float32, nothing is selected")
    assert "contains no module of stf_kernels" in str(stf_kernels.prepare(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"module": 3}, "module"),
        ({"batch_sizes": 1}, "batch_sizes"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"dtype": "half"}, "dtype"),
    ],
)
def test_arguments_that_are_refused(options, named):
    with pytest.raises((TypeError, ValueError), match=named):
        stf_kernels.prepare(**{"module": nn.Linear(2, 2), **options})
