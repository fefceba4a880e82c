"""One rank of a two-process run on CPU (gloo): python distributed_worker.py CASE RANK FILE. Raises where it differs.

Each rank has half of the batch; its gradients must be those of the whole batch in one process.
"""

import datetime
import functools
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import reference
import stf_kernels

WORLD, BATCH = 2, 4


def build():
    torch.manual_seed(1)  # the same on every rank
    theirs = reference.CompactTokenProjector(3, 8, 20, skip_tokens=1)
    ours = stf_kernels.CompactTokenProjector(3, 8, 20, skip_tokens=1)
    ours.load_state_dict(theirs.state_dict())
    blocks = [torch.randn(BATCH, 17, 8) for _ in range(3)]
    return ours, theirs, blocks, torch.randn(BATCH, 4, 20)


def share(tensor, rank):
    return tensor.chunk(WORLD)[rank]


def step(module, blocks, target):
    y = module(blocks)
    (y - target).square().mean().backward()
    return y.detach()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(module, theirs, blocks, target, rank, rounds=2):
    """Two optimiser steps, so that what one leaves behind is what the next one starts from."""
    mine, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, theirs))
    for _ in range(rounds):
        mine.zero_grad()
        other.zero_grad()
        y = step(module, [share(block, rank) for block in blocks], share(target, rank))
        expected = step(theirs, blocks, target)
        torch.testing.assert_close(y, share(expected, rank), rtol=1e-4, atol=1e-5)
        found = {name.removeprefix("module."): whole(p.grad) for name, p in module.named_parameters()}
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # and None where there is None
        mine.step()
        other.step()


def ddp(rank, mesh, frozen=False):
    """What is frozen must not be waited for."""
    ours, theirs, blocks, target = build()
    for module in (ours, theirs):
        module.mbtf.requires_grad_(not frozen)
    check(nn.parallel.DistributedDataParallel(ours), theirs, blocks, target, rank)


ddp_frozen_layers = functools.partial(ddp, frozen=True)
LINEARS = ("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2")


def fsdp(rank, mesh, places=()):
    """The modules at some places are sharded each for itself, then what is left of the whole."""
    ours, theirs, blocks, target = build()
    for place in (*places, ""):
        fully_shard(ours.get_submodule(place), mesh=mesh)
    assert all(isinstance(p, DTensor) for p in ours.parameters())
    check(ours, theirs, blocks, target, rank)


fsdp_whole = fsdp
fsdp_children = functools.partial(fsdp, places=("mbtf", "stf"))
fsdp_one_child = functools.partial(fsdp, places=("stf",))
fsdp_linears = functools.partial(fsdp, places=LINEARS)


def dtensor_replicated(rank, mesh):
    """Weights and blocks that are DTensors, as tensor parallelism hands them on: right, or refused with the place."""
    ours, theirs, blocks, _ = build()
    for linear in map(ours.get_submodule, LINEARS):
        for name, parameter in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])))
    spread = [distribute_tensor(block, mesh, [Replicate()]) for block in blocks]
    right_or_told_where(lambda: ours(spread), theirs(blocks))


def dtensor_weight_plain_blocks(rank, mesh):
    ours, theirs, blocks, _ = build()
    linear = ours.mbtf.linear_1
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
    right_or_told_where(lambda: ours(blocks), theirs(blocks))


def dtensor_function(rank, mesh):
    _, _, blocks, _ = build()
    weight = torch.randn(5, 24)
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    expected = stf_kernels.concat_linear(blocks, weight)
    right_or_told_where(lambda: stf_kernels.concat_linear(blocks, sharded), expected)


def dtensor_bias_alone(rank, mesh):
    ours, _, blocks, _ = build()
    spread = distribute_tensor(ours.stf.linear_1.bias.detach(), mesh, [Shard(0)])
    ours.stf.linear_1.bias = nn.Parameter(spread)
    told_where(lambda: ours(blocks))
    told_where(lambda: stf_kernels.concat_linear(blocks, torch.randn(spread.shape[0], 24), spread))


def dtensor_out(rank, mesh):
    ours, _, blocks, _ = build()
    out = distribute_tensor(torch.zeros(20, 20), mesh, [Replicate()])
    told_where(lambda: ours.requires_grad_(False)(blocks, out=out, rows=torch.arange(4 * BATCH)))


def told_where(call):
    with pytest.raises(TypeError, match=r"DTensor.*fully_shard"):
        call()


def right_or_told_where(call, expected):
    try:
        found = call()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        text = str(error)
        assert "DTensor" in text, text
        assert any(remedy in text for remedy in ("fully_shard", "full_tensor", "to_local")), text
    else:
        torch.testing.assert_close(whole(found), expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    rank, store, *cases = int(sys.argv[1]), sys.argv[2], *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    failed = False
    for case in cases:
        try:
            globals()[case](rank, mesh)
            print(f"{case}: passed", flush=True)
        except Exception as error:
            failed = True
            print(f"{case}: {type(error).__name__}: {str(error)[:2000]}".replace("\n", " | "), flush=True)
        dist.barrier()
    dist.destroy_process_group()
    sys.exit(failed)


if __name__ == "__main__":
    main()
