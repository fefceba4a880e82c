"""If this fails, a gradient of a two-process run (DDP, FSDP2, DTensor) is not the one of a single process.

Two processes on gloo, meeting in a file. Each rank has half of the batch; its gradients must be those of the whole
batch in one process.
"""

import datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from support.compare import twins
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import stf_kernels

WORLD, BATCH = 2, 4
LINEARS = ("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2")


def build():
    torch.manual_seed(1)  # the same on every rank
    ours, theirs, _ = twins("CompactTokenProjector", 3, 8, 20, skip_tokens=1, dtype=torch.float32)
    return ours, theirs, [torch.randn(BATCH, 17, 8) for _ in range(3)]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(module, theirs, blocks, rank):
    """Two optimiser steps, so that what one leaves behind is what the next one starts from."""
    mine, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, theirs))
    target = torch.randn(BATCH, 4, 20)
    for _ in range(2):
        mine.zero_grad()
        other.zero_grad()
        y, expected = module([block.chunk(WORLD)[rank] for block in blocks]), theirs(blocks)
        torch.testing.assert_close(y, expected.chunk(WORLD)[rank], rtol=1e-4, atol=1e-5)
        (y - target.chunk(WORLD)[rank]).square().mean().backward()
        (expected - target).square().mean().backward()
        found = {name.removeprefix("module."): whole(p.grad) for name, p in module.named_parameters()}
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # and None where there is None
        mine.step()
        other.step()


def ddp(rank, mesh, frozen=False):
    """What is frozen must not be waited for."""
    ours, theirs, blocks = build()
    for module in (ours, theirs):
        module.mbtf.requires_grad_(not frozen)
    check(nn.parallel.DistributedDataParallel(ours), theirs, blocks, rank)


def fsdp(rank, mesh, places=()):
    """The modules at some places are sharded each for itself, then what is left of the whole."""
    ours, theirs, blocks = build()
    for place in (*places, ""):
        fully_shard(ours.get_submodule(place), mesh=mesh)
    assert all(isinstance(p, DTensor) for p in ours.parameters())
    check(ours, theirs, blocks, rank)


def spread(mesh, module, name, place):
    """A parameter as tensor parallelism leaves it."""
    module.register_parameter(name, nn.Parameter(distribute_tensor(getattr(module, name).detach(), mesh, [place])))


def dtensors_everywhere(rank, mesh):
    """Right, or refused with the place."""
    ours, theirs, blocks = build()
    for linear in map(ours.get_submodule, LINEARS):
        spread(mesh, linear, "weight", Replicate())
        spread(mesh, linear, "bias", Replicate())
    right_or_told_where(lambda: ours([distribute_tensor(x, mesh, [Replicate()]) for x in blocks]), theirs(blocks))


def one_dtensor(rank, mesh, kind):
    ours, theirs, blocks = build()
    linear = ours.mbtf.linear_1
    plain = linear.weight.detach(), linear.bias.detach()
    expected = theirs(blocks), stf_kernels.concat_linear(blocks, *plain)
    spread(mesh, linear, kind, Shard(0))
    right_or_told_where(lambda: ours(blocks), expected[0])
    operands = (linear.weight, plain[1]) if kind == "weight" else (plain[0], linear.bias)
    right_or_told_where(lambda: stf_kernels.concat_linear(blocks, *operands), expected[1])


def an_out(rank, mesh):
    ours, _, blocks = build()
    out, rows = distribute_tensor(torch.zeros(20, 20), mesh, [Replicate()]), torch.arange(4 * BATCH)
    right_or_told_where(lambda: ours.requires_grad_(False)(blocks, out=out, rows=rows), None)


def right_or_told_where(call, expected):
    try:
        found = call()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        text = str(error)
        assert "DTensor" in text, text
        assert any(remedy in text for remedy in ("fully_shard", "full_tensor", "to_local")), text
    else:
        torch.testing.assert_close(whole(found), expected, rtol=1e-4, atol=1e-5)


CASES = {
    "ddp": ddp,
    "ddp frozen layers": partial(ddp, frozen=True),
    "fsdp": fsdp,
    "fsdp of children": partial(fsdp, places=("mbtf", "stf")),
    "fsdp of one child": partial(fsdp, places=("stf",)),
    "fsdp of linears": partial(fsdp, places=LINEARS),
    "dtensors everywhere": dtensors_everywhere,
    "a dtensor weight": partial(one_dtensor, kind="weight"),
    "a dtensor bias": partial(one_dtensor, kind="bias"),
    "a dtensor out": an_out,
}


def run(rank: int, file: Path) -> None:
    """In a process of its own: every case."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": WORLD, "timeout": datetime.timedelta(seconds=300)}
    dist.init_process_group("gloo", store=dist.FileStore(str(file), WORLD), **options)
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, case in CASES.items():
        try:
            case(rank, mesh)
        except Exception as error:
            raise AssertionError(name) from error
        dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    multiprocessing.spawn(run, (tmp_path / "store",), WORLD)
