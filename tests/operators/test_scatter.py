"""If this fails, image tokens land in the wrong rows of `out`, or rows that belong to text are touched."""

import pytest
import torch
from support.rule import assert_within_rule

import reference
import stf_kernels

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def build(dtype, **options):
    theirs = reference.CompactTokenProjector(3, 8, 12, **options).to(dtype).requires_grad_(False)
    ours = stf_kernels.CompactTokenProjector(3, 8, 12, **options, dtype=dtype).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["forward", "shuffled"])
def test_rows(order, dtype):
    ours, theirs = build(dtype)
    blocks = [torch.randn(2, 16, 8).to(dtype) for _ in range(3)]
    rows = torch.arange(3, 11) if order == "forward" else torch.randperm(20)[:8]
    out = torch.randn(20, 12).to(dtype)
    before = out.clone()
    returned = ours(blocks, out=out, rows=rows)
    assert returned is out
    untouched = torch.ones(20, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(out[untouched], before[untouched])
    exact = theirs.double()([block.double() for block in blocks]).flatten(0, 1)
    same = theirs.to(dtype)(blocks).flatten(0, 1)
    assert_within_rule("scattered rows", out[rows], same, exact)


def test_into_a_strided_view_of_inputs_embeds():
    """out may be columns of something wider; the columns beside it stay."""
    ours, theirs = build(torch.float32)
    blocks = [torch.randn(1, 16, 8) for _ in range(3)]
    wide = torch.zeros(9, 30)
    ours(blocks, out=wide[:, 5:17], rows=torch.tensor([8, 0, 3, 5]))
    torch.testing.assert_close(wide[[8, 0, 3, 5], 5:17], theirs(blocks)[0], rtol=1e-4, atol=1e-5)
    assert not wide[:, :5].any()
    assert not wide[:, 17:].any()


@pytest.mark.parametrize("options", [{"skip_tokens": 1}, {"truncate": True}, {"merge_size": 1}], ids=str)
def test_geometry(options):
    ours, theirs = build(torch.float32, **options)
    grid = (5, 4) if "truncate" in options else (4, 4)
    tokens = grid[0] * grid[1] + options.get("skip_tokens", 0)
    blocks = [torch.randn(2, tokens, 8) for _ in range(3)]
    expected = theirs(blocks, grid).flatten(0, 1)
    rows = torch.randperm(len(expected) + 4)[: len(expected)]
    out = ours(blocks, grid, out=torch.zeros(len(expected) + 4, 12), rows=rows)
    torch.testing.assert_close(out[rows], expected, rtol=1e-4, atol=1e-5)


def test_strided_rows():
    ours, theirs = build(torch.float32)
    blocks = [torch.randn(1, 16, 8) for _ in range(3)]
    rows = torch.tensor([3, 0, 1, 0, 5, 0, 7, 0])[::2]
    out = ours(blocks, out=torch.zeros(9, 12), rows=rows)
    torch.testing.assert_close(out[rows], theirs(blocks)[0], rtol=1e-4, atol=1e-5)


def test_without_the_fused_chain():
    """A hook on a layer takes the projector off the chain; the rows are written all the same."""
    ours, theirs = build(torch.float32)
    seen = []
    ours.stf.linear_2.register_forward_hook(lambda *_: seen.append(1))
    blocks = [torch.randn(1, 16, 8) for _ in range(3)]
    out = ours(blocks, out=torch.zeros(9, 12), rows=torch.tensor([8, 0, 3, 5]))
    torch.testing.assert_close(out[[8, 0, 3, 5]], theirs(blocks)[0], rtol=1e-4, atol=1e-5)
    assert seen == [1]


def test_empty_batch_writes_nothing():
    ours, _ = build(torch.float32)
    out = torch.ones(4, 12)
    ours([torch.randn(0, 16, 8)] * 3, out=out, rows=torch.empty(0, dtype=torch.int64))
    assert torch.equal(out, torch.ones(4, 12))


def test_under_autocast():
    """out in the dtype that nn.Linear gives, or in the blocks' own: both are what a model's embeddings may have."""
    ours, _ = build(torch.float32)
    blocks = [torch.randn(1, 16, 8) for _ in range(3)]
    rows = torch.tensor([8, 0, 3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        expected = ours(blocks)[0]
        out = ours(blocks, out=torch.zeros(9, 12), rows=rows)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(out[rows], expected.float())


def test_a_gradient_is_refused_and_nothing_written():
    ours, _ = build(torch.float32)
    ours.requires_grad_(True)
    blocks, out = [torch.randn(1, 16, 8)] * 3, torch.zeros(9, 12)
    with pytest.raises(ValueError, match=r"out.*inference.*no_grad"):
        ours(blocks, out=out, rows=torch.arange(4))
    assert not out.any()
    with torch.no_grad():
        ours(blocks, out=out, rows=torch.arange(4))
    assert out[:4].any()


def test_out_that_carries_a_gradient_is_refused():
    """A kernel writes past autograd: the overwritten rows would go on passing a gradient to what was there before."""
    ours, _ = build(torch.float32)
    out = torch.zeros(9, 12, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"out.*inference.*no_grad"):
        ours([torch.randn(1, 16, 8)] * 3, out=out, rows=torch.tensor([1, 2, 5, 7]))
    assert not out.any()


def test_the_fallback_writes_too_under_autocast():
    """STF alone is no chain of four: its rows are inserted, in the dtype of out."""
    module = stf_kernels.CompactTokenProjector(1, 8, 12, mbtf=False).requires_grad_(False)
    rows = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = module([torch.randn(1, 16, 8)], out=torch.zeros(9, 12), rows=rows)
    assert out[:4].any()
    assert not out[4:].any()


def test_autograd_sees_that_out_was_changed():
    ours, _ = build(torch.float32)
    out, scale = torch.zeros(9, 12), torch.ones(12, requires_grad=True)
    y = out * scale  # keeps out for the gradient of scale
    ours([torch.randn(1, 16, 8)] * 3, out=out, rows=torch.arange(4))
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()
