"""If this fails, image tokens land in the wrong rows of `out`, or rows that belong to text are touched."""

import pytest
import torch
from support.compare import compare_rows, twins

import stf_kernels


def build(**options):
    module = stf_kernels.CompactTokenProjector(3, 8, 12, **options).requires_grad_(False)
    return module, [torch.randn(1, 16, 8) for _ in range(3)]


# options, grid
GEOMETRIES = {
    "plain": ({}, (4, 4)),
    "class-token": ({"skip_tokens": 1}, (4, 4)),
    "truncated": ({"truncate": True}, (5, 4)),
    "r1": ({"merge_size": 1}, (4, 4)),
    "stf-alone": ({"mbtf": False}, (4, 4)),  # no chain of four: its rows are inserted
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["forward", "shuffled", "strided"])
@pytest.mark.parametrize(("options", "grid"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_rows(options, grid, order, dtype):
    count = 1 if "mbtf" in options else 3
    tokens = grid[0] * grid[1] + options.get("skip_tokens", 0)
    blocks = [torch.randn(2, tokens, 8).to(dtype) for _ in range(count)]
    compare_rows(twins("CompactTokenProjector", count, 8, 12, **options, dtype=dtype), blocks, grid, order)


def test_a_subclass_goes_through_the_dispatcher():
    (module, blocks), subclass = build(), type("Subclass", (torch.Tensor,), {})
    rows = torch.tensor([8, 0, 3, 5])
    out = module([block.as_subclass(subclass) for block in blocks], out=torch.zeros(9, 12), rows=rows)
    assert torch.equal(out[rows], module(blocks)[0])


def test_an_empty_batch_writes_nothing():
    module, _ = build()
    out = torch.ones(4, 12)
    module([torch.randn(0, 16, 8)] * 3, out=out, rows=torch.empty(0, dtype=torch.int64))
    assert torch.equal(out, torch.ones(4, 12))


@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast(fused):
    """out in the blocks' own dtype, as a model's embeddings are; the other rows keep all of their digits.

    A hook on a layer takes the projector off the chain; the rows are written all the same.
    """
    (module, blocks), seen = build(), []
    if not fused:
        module.stf.linear_2.register_forward_hook(lambda *_: seen.append(1) and None)
    out = torch.randn(9, 12)
    before, rows = out.clone(), torch.tensor([8, 0, 3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(blocks)[0]
        module(blocks, out=out, rows=rows)
    assert expected.dtype == torch.bfloat16
    before[rows] = expected.float()
    assert torch.equal(out, before)
    assert len(seen) == (0 if fused else 2)


@pytest.mark.parametrize("carrier", ["parameters", "out"])
def test_a_gradient_is_refused_and_nothing_written(carrier):
    """A kernel writes past autograd: overwritten rows would go on passing a gradient to what was there before."""
    module, blocks = build()
    module.requires_grad_(carrier == "parameters")
    out, rows = torch.zeros(9, 12, requires_grad=carrier == "out") * 1, torch.arange(4)
    with pytest.raises(ValueError, match=r"out.*inference.*no_grad"):
        module(blocks, out=out, rows=rows)
    assert not out.any()
    with torch.no_grad():
        module(blocks, out=out, rows=rows)
    assert out[:4].any()


def test_autograd_sees_that_out_was_changed():
    module, blocks = build()
    out, scale = torch.zeros(9, 12), torch.ones(12, requires_grad=True)
    y = out * scale  # keeps out for the gradient of scale
    module(blocks, out=out, rows=torch.arange(4))
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()
