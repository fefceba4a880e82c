"""If this fails, the chain does not survive how GPUs are driven: graphs, streams, devices, no synchronisation, or a
first use selects what is wrong.
"""

import copy
import json

import pytest
import torch
from support.compare import compare_modules, compare_rows, twins
from torch._dynamo.testing import CompileCounterWithBackend

import stf_kernels
from stf_kernels.configs import GemmConfig, selection, tables
from stf_kernels.ops import launch
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

pytestmark = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize("backend", ["triton", "auto"])


def build(device="cuda", dtype=torch.bfloat16, batch=2):
    torch.manual_seed(5)
    module = stf_kernels.CompactTokenProjector(4, 128, 256, skip_tokens=1, dtype=dtype, device=device)
    return module, [torch.randn(batch, 65, 128, dtype=dtype, device=device) for _ in range(4)]


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


def projector(batch):
    module, blocks = build(batch=batch)
    return lambda: module(blocks)


def split_k(_):
    """A call that shares K out: 256 features of one image."""
    x, weight = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((1, 144, 4096), (256, 4096)))
    config = GemmConfig(64, 64, 64, split_k=8)
    return lambda: run_stage([x], weight / 64, None, Stage("gelu"), config)[0]


@BACKENDS
@pytest.mark.parametrize("make", [projector, split_k])
def test_two_streams_at_once(backend, make):
    """What a launch allocates (results, parts, counters) must not be another stream's."""
    calls, found, streams = [make(1), make(3)], [[], []], [torch.cuda.Stream() for _ in range(2)]
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


@BACKENDS
def test_no_host_synchronisation(backend):
    module, blocks = build()
    out = torch.zeros(100, 256, dtype=torch.bfloat16, device="cuda")
    rows = torch.randperm(100, device="cuda")[:32]

    def call():
        module(blocks).sum().backward()
        with torch.no_grad():
            module(blocks)
            module(blocks, out=out, rows=rows)

    with stf_kernels.use_backend(backend):
        call()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@BACKENDS
def test_indexed_rows(backend):
    modules = twins("CompactTokenProjector", 4, 128, 256, skip_tokens=1, dtype=torch.bfloat16, device="cuda")
    with stf_kernels.use_backend(backend):
        compare_rows(modules, build()[1], (8, 8))


@BACKENDS
def test_compiled(backend):
    """Few graphs, and the bits of eager calls: two runs give the same."""
    torch._dynamo.reset()
    module, _ = build()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with stf_kernels.use_backend(backend):
        for batch in (2, 3, 5, 8):
            blocks = [block.requires_grad_() for block in build(batch=batch)[1]]
            leaves = [*blocks, *module.parameters()]
            ys = compiled(blocks), module(blocks), module(blocks)
            runs = [[y, *torch.autograd.grad(y.float().sum(), leaves)] for y in ys]
            assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [False, True])
def test_a_projector_is_selected_and_right(dtype, training, monkeypatch, tmp_path):
    """Every product has an entry with the time of plain torch and of others, and no candidate was wrong."""
    monkeypatch.setenv("STF_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(selection, "selects", lambda: True)
    tables.cache_of.cache_clear()
    launch.forget()
    try:
        modules = twins("CompactTokenProjector", 4, 128, 256, skip_tokens=1, dtype=dtype, device="cuda")
        report = stf_kernels.prepare(modules[0], batch_sizes=(2,), training=training, grid=(12, 12))
        assert {entry["by"] for entry in report.entries} <= {"selected", "table"}, str(report)
        blocks = [torch.randn(2, 145, 128, device="cuda") for _ in range(4)]
        compare_modules(modules, blocks, dtype, gradients=training)
        [path] = tmp_path.glob("*.json")
        kept = json.loads(path.read_text())
        assert not kept["failed"]
        assert all(len(entry["candidates"]) > 1 for entry in kept["entries"])
    finally:
        tables.cache_of.cache_clear()
        launch.forget()
