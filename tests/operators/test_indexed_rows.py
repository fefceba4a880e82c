"""If this fails, image tokens land in the wrong rows of `out`, or rows that belong to text are touched."""

import pytest
import torch
from support.compare import compare_rows, twins
from support.modules import CASES

import stf_kernels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["forward", "shuffled", "strided"])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("case", ["projector", "class-token", "truncated", "r1-tanh", "stf-alone"])
def test_rows(case, batch, order, dtype):
    """STF alone is no chain of four: its rows are inserted."""
    name, args, grid, options = CASES[case]
    tokens = grid[0] * grid[1] + options.get("skip_tokens", 0)
    blocks = [torch.randn(batch, tokens, args[1]).to(dtype) for _ in range(args[0])]
    compare_rows(twins(name, *args, **options, dtype=dtype), blocks, grid, order)


@pytest.fixture
def case():
    """A projector and its blocks, whose four tokens go to these rows of an `out` of nine."""
    module = stf_kernels.CompactTokenProjector(3, 8, 12).requires_grad_(False)
    return module, [torch.randn(1, 16, 8) for _ in range(3)], torch.tensor([8, 0, 3, 5])


def test_a_subclass_goes_through_the_dispatcher(case):
    (module, blocks, rows), subclass = case, type("Subclass", (torch.Tensor,), {})
    out = module([block.as_subclass(subclass) for block in blocks], out=torch.zeros(9, 12), rows=rows)
    assert torch.equal(out[rows], module(blocks)[0])
    weights = torch.randn(5, 24), torch.randn(5, 24).as_subclass(subclass)
    assert [type(stf_kernels.concat_linear(blocks, weight)) for weight in weights] == [torch.Tensor, subclass]


@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast(case, fused):
    """out in the blocks' own dtype, as a model's embeddings are; the other rows keep all of their digits.

    A hook on a layer takes the projector off the chain; the rows are written all the same.
    """
    (module, blocks, rows), seen = case, []
    if not fused:
        module.stf.linear_2.register_forward_hook(lambda *_: seen.append(1) and None)
    out = torch.randn(9, 12)
    before = out.clone()
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(blocks)[0]
        module(blocks, out=out, rows=rows)
    assert expected.dtype == torch.bfloat16
    before[rows] = expected.float()
    assert torch.equal(out, before)
    assert len(seen) == (0 if fused else 2)


@pytest.mark.parametrize("carrier", ["parameters", "out"])
def test_a_gradient_is_refused_and_nothing_written(case, carrier):
    """A kernel writes past autograd: overwritten rows would go on passing a gradient to what was there before."""
    module, blocks, rows = case
    module.requires_grad_(carrier == "parameters")
    out = torch.zeros(9, 12, requires_grad=carrier == "out") * 1
    with pytest.raises(ValueError, match=r"out.*inference.*no_grad"):
        module(blocks, out=out, rows=rows)
    assert not out.any()
    with torch.no_grad():
        module(blocks, out=out, rows=rows)
    assert out[rows].any()
