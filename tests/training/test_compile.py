"""If this fails, torch.compile breaks the graph, compiles once per batch size, or computes other values than eager."""

import pytest
import torch
from support.modules import EACH_MODULE, build, draw, flat
from support.operators import CASES
from torch._dynamo.testing import CompileCounterWithBackend

import stf_kernels


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@EACH_MODULE
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_five_batch_sizes_are_two_graphs_of_one_operator(name, grad):
    module, counter = build(name).requires_grad_(grad), CompileCounterWithBackend("aot_eager")
    run = compiled(module, counter)
    for batch in (2, 3, 5, 8, 4):
        x = draw(name, batch, requires_grad=grad)
        y, z = run(x), module(x)
        assert torch.equal(y, z)
        if grad:
            leaves, dy = [*flat(x), *module.parameters()], torch.randn_like(y)
            assert_same(*(torch.autograd.grad(out, leaves, dy) for out in (y, z)))
        assert counter.frame_count == (1 if batch == 2 else 2)
    nodes = [node for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("stf_kernels" in str(node.target) for node in nodes) == 1  # however many layers


@pytest.mark.parametrize("case", ["act-gelu", "merge-last-of-both", "merge-batch-inner"])
def test_functions(case):
    """The gradients' strides must be what the compiler was told."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in CASES[case].shapes]

    def run(*leaves):
        return CASES[case].call(stf_kernels, *leaves).relu().sum()

    assert_same(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled(run), run)))


def test_indexed_rows():
    """`out` is changed in place by a graph, and the caller's tensor is the one that changes."""
    module, blocks = build("CompactTokenProjector").requires_grad_(False), draw("CompactTokenProjector")

    def run(embeds, rows):
        out = embeds * 2
        module(blocks, out=out, rows=rows)
        return out + 1

    embeds, rows = torch.randn(30, 20), torch.randperm(30)[:8]
    assert torch.equal(compiled(run)(embeds, rows), run(embeds, rows))
    expected, found = embeds.clone(), embeds.clone()
    module(blocks, out=expected, rows=rows)
    compiled(lambda out, rows: module(blocks, out=out, rows=rows))(found, rows)
    assert torch.equal(found, expected)


def test_a_whole_training_step_in_autocast():
    module, x = build("CompactTokenProjector", skip_tokens=1), draw("CompactTokenProjector", tokens=25)
    run, parameters = compiled(module), list(module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        y, z = run(x, (4, 6)), module(x, (4, 6))
    assert y.dtype == torch.bfloat16
    assert_same(y, z)
    found, expected = (torch.autograd.grad(out.float().sum(), parameters) for out in (y, z))
    assert_same(found, expected)


def test_a_wrapped_layer_still_runs():
    module, x, seen = build("CompactTokenProjector"), draw("CompactTokenProjector"), []
    module.mbtf.linear_1.register_forward_hook(lambda _, __, y: seen.append(1) or y * 2)
    assert torch.equal(torch.compile(module, backend="aot_eager")(x), module(x))
    assert len(seen) >= 2


def test_inductor_keeps_what_the_operator_is_given():
    """The default backend needs no C++ compiler here, because no kernel of its own is left to build."""
    module, x = build("CompactTokenProjector").requires_grad_(False), draw("CompactTokenProjector")
    torch.testing.assert_close(compiled(module, "inductor")(x), module(x))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_a_second_resolution(grad, dynamic):
    """A square grid is worked out from a number of tokens that torch.compile may hold as a symbol."""
    module = build("CompactTokenProjector")
    run = compiled(module, dynamic=dynamic)
    for side, batch in ((4, 2), (6, 3), (8, 1)):
        x = draw("CompactTokenProjector", batch, side**2)
        with torch.set_grad_enabled(grad):
            assert torch.equal(run(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_computes_and_trains(strict):
    """strict keeps the operator; the default writes the layers out, for runtimes without this library."""
    module, x = build("CompactTokenProjector"), draw("CompactTokenProjector")
    program = torch.export.export(module, (x,), strict=strict)
    operators = [node for node in program.graph.nodes if "stf_kernels" in str(node.target)]
    assert len(operators) == (1 if strict else 0)
    exported = program.module()
    y, expected = exported(x), module(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    names, leaves = zip(*module.named_parameters(), strict=True)
    own = dict(exported.named_parameters())
    assert own.keys() == set(names)
    found = torch.autograd.grad(y.square().sum(), [own[name] for name in names])
    exact = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
