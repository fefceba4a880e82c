"""If this fails, the chain does not survive how GPUs are driven: graphs, streams, devices, no synchronisation."""

import copy

import pytest
import torch
from support.compare import compare_modules, compare_rows, twins

import stf_kernels
from stf_kernels.configs import GemmConfig
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

pytestmark = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize("backend", ["triton", "auto"])


def build(device="cuda", dtype=torch.bfloat16, batch=2):
    torch.manual_seed(5)
    module = stf_kernels.CompactTokenProjector(4, 128, 256, skip_tokens=1, dtype=dtype, device=device)
    return module, [torch.randn(batch, 65, 128, dtype=dtype, device=device) for _ in range(4)]


@pytest.fixture
def no_sync():
    """Context inside which a host synchronisation raises."""

    class NoSync:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield NoSync()
    torch.cuda.set_sync_debug_mode("default")


def warmed_up(call, times=3):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@BACKENDS
def test_graph_of_the_forward(backend):
    module, blocks = build()
    module.requires_grad_(False)
    with stf_kernels.use_backend(backend), torch.no_grad():
        warmed_up(lambda: module(blocks))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(blocks)
        for seed in range(3):
            torch.manual_seed(seed)
            for block in blocks:
                block.normal_()
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, module(blocks))  # an eager launch between two replays


@BACKENDS
def test_graph_of_a_training_step(backend):
    module, blocks = build(dtype=torch.float32)
    eager = copy.deepcopy(module)
    target = torch.randn(2, 16, 256, device="cuda")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (module, eager)]

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        loss = (model(blocks) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with stf_kernels.use_backend(backend):
        state = copy.deepcopy(module.state_dict())
        warmed_up(lambda: step(module, optimizers[0]))
        module.load_state_dict(state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(module, optimizers[0])
        module.load_state_dict(state)
        losses = []
        for _ in range(4):
            graph.replay()
            losses.append(loss.item())
            step(eager, optimizers[1])
    assert losses[-1] < losses[0]
    for mine, other in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def split_k():
    """A call that shares K out: 256 features of one image."""
    x, weight = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((1, 144, 4096), (256, 4096)))
    config = GemmConfig(64, 64, 64, split_k=8)
    return lambda: run_stage([x], weight / 64, None, Stage("gelu"), config)[0]


def projector(batch):
    module, blocks = build(batch=batch)
    return lambda: module(blocks)


@BACKENDS
@pytest.mark.parametrize(
    "pair", [lambda: (projector(1), projector(3)), lambda: (split_k(), split_k())], ids=["chain", "k"]
)
def test_two_streams_at_once(backend, pair):
    """What a launch allocates (results, parts, counters) must not be another stream's."""
    calls, found, streams = pair(), [[], []], [torch.cuda.Stream() for _ in range(2)]
    with stf_kernels.use_backend(backend), torch.no_grad():
        expected = [call() for call in calls]
        torch.cuda.synchronize()
        for _ in range(100):
            for call, stream, outputs in zip(calls, streams, found, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(call())
        torch.cuda.synchronize()
    for outputs, exact in zip(found, expected, strict=True):
        assert all(torch.equal(y, exact) for y in outputs)


@pytest.mark.parametrize("grad", [True, False], ids=["train", "inference"])
@BACKENDS
def test_no_host_synchronisation(no_sync, grad, backend):
    module, blocks = build()
    out = torch.zeros(100, 256, dtype=torch.bfloat16, device="cuda")
    rows = torch.randperm(100, device="cuda")[:32]

    def call():
        with torch.set_grad_enabled(grad):
            y = module(blocks)
            if grad:
                y.sum().backward()
            else:
                module(blocks, out=out, rows=rows)

    with stf_kernels.use_backend(backend):
        call()  # compiles
        with no_sync:
            call()


@BACKENDS
def test_indexed_rows(backend):
    _, blocks = build()
    with stf_kernels.use_backend(backend):
        compare_rows(
            twins("CompactTokenProjector", 4, 128, 256, skip_tokens=1, dtype=torch.bfloat16, device="cuda"),
            blocks,
            (8, 8),
        )


def test_autograd_sees_that_out_was_changed():
    """A kernel writes through a pointer: nothing but the operator can tell autograd."""
    module, blocks = build()
    module.requires_grad_(False)
    out = torch.zeros(60, 256, dtype=torch.bfloat16, device="cuda")
    scale = torch.ones(256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = out * scale
    with stf_kernels.use_backend("triton"):
        module(blocks, out=out, rows=torch.arange(32, device="cuda"))
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


@BACKENDS
def test_two_runs_give_the_same_bits(backend):
    module, blocks = build(batch=8)
    blocks = [block.requires_grad_() for block in blocks]
    leaves, runs = [*blocks, *module.parameters()], []
    with stf_kernels.use_backend(backend):
        for _ in range(3):
            y = module(blocks)
            runs.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@BACKENDS
def test_compiled(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module, _ = build()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with stf_kernels.use_backend(backend):
        for batch in (2, 3, 5, 8):
            _, blocks = build(batch=batch)
            y, z = compiled(blocks), module(blocks)
            assert torch.equal(y, z)
            grads = [torch.autograd.grad(t.float().sum(), list(module.parameters())) for t in (y, z)]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


def test_compiled_by_inductor_with_cuda_graphs():
    torch._dynamo.reset()
    module, blocks = build()
    module.requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            y = compiled(blocks).clone()
    torch.testing.assert_close(y, module(blocks))


def test_autocast_is_nn_linears():
    module, blocks = build(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y = module(blocks)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_float64_takes_the_torch_path():
    modules = twins("CompactTokenProjector", 4, 128, 256, skip_tokens=1, dtype=torch.float64, device="cuda")
    compare_modules(modules, build()[1], torch.float64, gradients=True)


def test_the_other_device():
    """Tensors on cuda:1 while cuda:0 is current: the launch must follow the tensors."""
    # with one GPU the same code runs, without the change of device
    device = "cuda:0" if torch.cuda.device_count() < 2 else "cuda:1"
    modules = twins("CompactTokenProjector", 4, 128, 256, skip_tokens=1, dtype=torch.bfloat16, device=device)
    with stf_kernels.use_backend("triton"):
        y = compare_modules(modules, build(device)[1], torch.bfloat16, gradients=True)
    assert str(y.device) == device
    assert torch.cuda.current_device() == 0


def test_operands_on_two_devices_are_refused():
    module, blocks = build()
    with pytest.raises(ValueError, match=r"blocks\[3\].*device.*cuda.*cpu"):
        module([*blocks[:3], blocks[3].cpu()])
