"""If this fails, torch.compile breaks the graph, compiles once per batch size, or computes other values than eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import stf_kernels


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name, **options):
    """(module, function of the batch size that draws its arguments)"""
    if name == "SpatialTokenFusion":
        return stf_kernels.SpatialTokenFusion(8, 20, **options), lambda batch: (torch.randn(batch, 24, 8), (4, 6))
    cls = getattr(stf_kernels, name)
    args = (3, 8) if name == "MultiBlockTokenFusion" else (3, 8, 20)
    return cls(*args, skip_tokens=1, **options), lambda batch: ([torch.randn(batch, 17, 8) for _ in range(3)],)


NAMES = pytest.mark.parametrize("name", ["MultiBlockTokenFusion", "SpatialTokenFusion", "CompactTokenProjector"])


@NAMES
@pytest.mark.parametrize("grad", [True, False], ids=["train", "inference"])
def test_one_graph_and_the_same_values(name, grad):
    module, draw = build(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    arguments = draw(2)
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(*arguments), module(*arguments))
    assert counter.frame_count == 1
    nodes = [node for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("stf_kernels" in str(node.target) for node in nodes) == 1  # one operator, however many layers


@pytest.mark.parametrize(
    ("name", "grad"),
    [
        ("MultiBlockTokenFusion", True),
        ("SpatialTokenFusion", True),
        *[("CompactTokenProjector", grad) for grad in (True, False)],
    ],
)
def test_five_batch_sizes_are_two_graphs(name, grad):
    module, draw = build(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for batch in (2, 3, 5, 8, 4):
            arguments = draw(batch)
            torch.testing.assert_close(compiled(*arguments), module(*arguments), rtol=0, atol=0)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultiBlockTokenFusion", {"activation": "silu"}),
        ("SpatialTokenFusion", {"bias": False}),
        ("CompactTokenProjector", {}),
    ],
)
def test_gradients(name, options):
    module, draw = build(name, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        arguments = draw(batch)
        blocks = arguments[0] if isinstance(arguments[0], list) else [arguments[0]]
        leaves = [block.requires_grad_() for block in blocks] + list(module.parameters())
        y, z = compiled(*arguments), module(*arguments)
        dy = torch.randn_like(y)
        for mine, eager in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(z, leaves, dy), strict=True):
            torch.testing.assert_close(mine, eager, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["concat_linear", "spatial_merge_linear"])
def test_functions(name):
    def run(x, weight, bias):
        if name == "concat_linear":
            return stf_kernels.concat_linear([x, x.sin()], weight, bias, activation="gelu", skip_tokens=1).relu()
        return stf_kernels.spatial_merge_linear(x, weight, bias, grid=(2, 4), activation="silu", skip_tokens=1).relu()

    weight = torch.randn(6, 8 if name == "concat_linear" else 16, requires_grad=True)
    x, bias = torch.randn(2, 9, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, weight, bias).sum(), (x, weight, bias))
    for mine, eager in zip(found, torch.autograd.grad(run(x, weight, bias).sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(mine, eager, rtol=0, atol=0)


def test_scatter():
    """`out` is changed in place by a graph, and the caller's tensor is the one that changes."""
    module, draw = build("CompactTokenProjector")
    module.requires_grad_(False)

    def run(blocks, embeds, rows):
        out = embeds * 2
        module(blocks, out=out, rows=rows)
        return out + 1

    def into(blocks, out, rows):
        module(blocks, out=out, rows=rows)

    (blocks,) = draw(2)
    embeds, rows = torch.randn(30, 20), torch.randperm(30)[:8]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(blocks, embeds, rows), run(blocks, embeds, rows))
    expected, found = embeds.clone(), embeds.clone()
    into(blocks, expected, rows)
    torch.compile(into, fullgraph=True, backend="aot_eager")(blocks, found, rows)
    assert torch.equal(found, expected)
    assert not torch.equal(found, embeds)


def test_a_whole_training_step_in_autocast():
    module, draw = build("CompactTokenProjector")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = draw(2)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = compiled(*arguments), module(*arguments)
    assert y.dtype == z.dtype == torch.bfloat16
    assert torch.equal(y, z)
    parameters = list(module.parameters())
    found = torch.autograd.grad(y.float().sum(), parameters)
    for mine, eager in zip(found, torch.autograd.grad(z.float().sum(), parameters), strict=True):
        assert torch.equal(mine, eager)


def test_errors_are_those_of_eager():
    module, draw = build("CompactTokenProjector")
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(Exception, match="num_blocks"):
        compiled(draw(2)[0][:2])


def test_a_wrapped_layer_still_runs():
    module, draw = build("CompactTokenProjector")
    seen = []
    module.mbtf.linear_1.register_forward_hook(lambda _, __, y: seen.append(1) or y * 2)
    compiled = torch.compile(module, backend="aot_eager")
    arguments = draw(2)
    assert torch.equal(compiled(*arguments), module(*arguments))
    assert len(seen) >= 2


def test_inductor_keeps_what_the_operator_is_given():
    """The default backend needs no C++ compiler here, because no kernel of its own is left to build."""
    module, draw = build("CompactTokenProjector")
    module.requires_grad_(False)
    arguments = draw(2)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(*arguments), module(*arguments))


@pytest.mark.parametrize("grad", [True, False], ids=["train", "inference"])
def test_a_second_resolution(grad):
    """A square grid is worked out from a number of tokens that torch.compile may hold as a symbol."""
    module = stf_kernels.CompactTokenProjector(3, 8, 20)
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for side, batch in ((4, 2), (6, 3), (8, 1)):
            blocks = [torch.randn(batch, side**2, 8) for _ in range(3)]
            with torch.set_grad_enabled(grad):
                assert torch.equal(compiled(blocks), module(blocks))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_computes_and_trains(strict):
    """strict keeps the operator; the default writes the layers out, for runtimes without this library."""
    module, draw = build("CompactTokenProjector")
    arguments = draw(2)
    program = torch.export.export(module, arguments, strict=strict)
    operators = [node for node in program.graph.nodes if "stf_kernels" in str(node.target)]
    assert len(operators) == (1 if strict else 0)
    exported = program.module()
    y, expected = exported(*arguments), module(*arguments)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    names, leaves = zip(*module.named_parameters(), strict=True)
    own = dict(exported.named_parameters())
    assert own.keys() == set(names)
    found = torch.autograd.grad(y.square().sum(), [own[name] for name in names])
    for mine, exact in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)
