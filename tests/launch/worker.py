"""Launches on the recording driver -> JSON. Arguments: the architecture, and what to do (a function of this file)."""

import itertools
import json
import sys
from dataclasses import replace

import recording_driver
import torch

RECORDER = recording_driver.install(sys.argv[1])

from triton.runtime.jit import JITFunction  # noqa: E402

from stf_kernels.configs import GemmConfig  # noqa: E402
from stf_kernels.ops import launch  # noqa: E402
from stf_kernels.ops.segments import Stage  # noqa: E402

TILE = GemmConfig(64, 64, 32, num_warps=4, num_stages=2)
TMA = replace(TILE, form="tma")
SWAP_AB = replace(TILE, form="swap_ab", tail_m=16)
GELU = Stage("gelu")
MERGE = Stage("gelu", merge_in=2, grid=(24, 24))


def tower(count: int, batch: int, tokens: int, c: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [block[:, 1:] for block in torch.zeros(count, batch, tokens + 1, c, dtype=dtype)]


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same shape and strides, one element off a 16-byte boundary."""
    return torch.zeros(x.stride(0) * x.shape[0] + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())


def calls():
    """(name, call): every form, and every way in which two calls may look alike and are not."""
    blocks, bf16 = tower(8, 2, 576, 256), torch.bfloat16
    weight, bias, x = (
        torch.zeros(512, 2048, dtype=bf16),
        torch.zeros(512, dtype=bf16),
        torch.zeros(2, 576, 256).to(bf16),
    )
    square, merged = torch.zeros(512, 256, dtype=bf16), torch.zeros(512, 1024, dtype=bf16)
    out, rows = torch.zeros(2000, 512, dtype=bf16), torch.arange(1152)

    def stage(name, blocks=blocks, weight=weight, bias=bias, stage=GELU, config=TILE, **options):
        return name, lambda: launch.run_stage(blocks, weight, bias, stage, config, **options)

    yield stage("pointer")
    yield stage("save_pre", save_pre=True)
    yield stage("no bias", bias=None)
    yield stage("no activation", stage=Stage())
    yield stage("a bias in fp32", bias=bias.float())
    yield stage("fewer features", weight=weight[:448], bias=bias[:448])
    yield stage("another batch", blocks=tower(8, 3, 576, 256))
    yield stage("other tokens", blocks=tower(8, 2, 575, 256))
    yield stage("unlike strides", blocks=[*blocks[:7], tower(1, 2, 580, 256)[0][:, :576]])
    yield stage("an unaligned block", blocks=[*blocks[:7], shifted(blocks[7])])
    yield stage("an unaligned weight", weight=shifted(weight))
    yield stage("an unaligned bias", bias=shifted(bias))
    yield stage("a pending sign", blocks=[*blocks[:7], torch._neg_view(blocks[7])])
    yield stage("rows of the weight apart", weight=torch.zeros(512, 2056, dtype=bf16)[:, :2048])
    yield stage("float16", [b.half() for b in blocks], weight.half(), bias.half())
    wide = tower(8, 2, 576, 256, torch.float32), weight.float(), bias.float()
    yield stage("float32", *wide)

    def tf32():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        launch.run_stage(*wide, GELU, TILE)
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    yield "tf32", tf32
    yield stage("split K", config=replace(TILE, split_k=4))
    yield stage("merged on load", [x], merged, stage=MERGE)
    across = torch.zeros(2, 256, 576, dtype=bf16).transpose(1, 2)
    yield stage("merged on load once copied", [across], merged, stage=MERGE)
    yield stage("merged on store", [x], square, stage=Stage(merge_out=2, grid=(24, 24)))
    yield stage("indexed", [x], square, out=out, rows=rows)
    yield stage("indexed in fewer rows", [x], square, out=out[:1500], rows=rows)
    yield stage("indexed in unaligned rows", [x], square, out=shifted(out), rows=rows)
    yield stage("indexed in fp32", [x], square, out=out.float(), rows=rows)
    yield stage("indexed in rows apart", [x], square, out=torch.zeros(2000, 520, dtype=bf16)[:, :512], rows=rows)
    if sys.argv[1] == "sm_90":
        dense = [torch.zeros(1, 144, 256, dtype=bf16)]
        yield stage("pointer pdl", config=replace(TILE, pdl=True))
        yield stage("tma cropped", config=replace(TMA, block_m=192))
        memory = torch.zeros(8 * (2 * 577 * 256 + 8), dtype=bf16).view(8, -1)[:, : 2 * 577 * 256].view(8, 2, 577, 256)
        yield stage("tma in other units", list(memory[:, :, 1:]), config=replace(TMA, block_m=192))
        yield stage("tma dense", dense, square, config=TMA)
        yield stage("swap_ab", dense, square, config=SWAP_AB)
        yield stage("swap_ab split K", dense, square, config=replace(SWAP_AB, split_k=4))
        yield stage("swap_ab split K pdl", dense, square, config=replace(SWAP_AB, split_k=4, pdl=True))


def repeated() -> dict:
    """Of every call: what the driver saw where nothing was ready, then twice more; how often the JIT ran."""
    bound, memory, streams, run = [], {}, itertools.count(0x70), JITFunction.run
    JITFunction.run = lambda *a, **k: bound.append(1) or run(*a, **k)
    for allocate in (torch.empty, torch.zeros):  # the same memory in each turn, or addresses of results would differ

        def same(*a, _allocate=allocate, **k):
            return memory.setdefault((next(allocation), str(a), str(k)), _allocate(*a, **k))

        setattr(torch, allocate.__name__, same)

    copied = launch.with_contiguous_last
    launch.with_contiguous_last = lambda x: memory.setdefault((x.data_ptr(), x.stride(), x.is_neg()), copied(x))

    def seen(call) -> dict:
        nonlocal allocation
        allocation, RECORDER.stream = itertools.count(), next(streams)
        bound.clear()
        call()
        return {"launches": [found._asdict() for found in RECORDER.take()], "bound": len(bound), "on": RECORDER.stream}

    allocation, found = itertools.count(), {}
    for name, call in list(calls()):
        memory.clear()
        kept = dict(launch._ready)
        launch._ready.clear()
        cold = seen(call)
        launch._ready.clear()
        launch._ready.update(kept)
        found[name] = [cold, seen(call), seen(call)]
    return found


def errors() -> dict:
    """Of a configuration that was named: what Triton's launcher raises for it, as the caller sees it."""
    blocks, weight, found = tower(1, 1, 576, 256), torch.zeros(512, 256, dtype=torch.bfloat16), {}
    RECORDER.refuse_descriptors(True)
    for name, config in (("too large", GemmConfig(128, 256, 64, num_warps=8, num_stages=5)), ("refused", TMA)):
        try:
            launch.run_stage(blocks, weight, None, GELU, config)
        except Exception as error:
            found[name] = [f"{type(error).__name__}: {error}", len(RECORDER.take())]
    return found


def first_use() -> dict:
    """Calls that name no configuration: while a graph is captured, then three times; the second candidate is the
    fastest. What the driver saw of each, and of a call that names that candidate."""
    from stf_kernels.configs import Gemm, selection
    from stf_kernels.ops import first_use

    def medians(calls, device, most):
        for call in calls:
            call()
        return [50.0 if call.args[1] is None else 30.0 if call.args[1] == fast else 60.0 for call in calls]

    first_use.medians, first_use.Expected.differs = medians, lambda *_: None  # nothing is computed here
    selection.selects = lambda: True
    blocks = tower(8, 2, 576, 256)
    weight, bias = torch.randn(512, 2048).bfloat16(), torch.zeros(512, dtype=torch.bfloat16)
    what = 0, Gemm("concat", torch.bfloat16, 1152, 512, 2048)
    fast, capturing, found = selection.contenders(*what)[1], [True, False, False, False], []
    torch.cuda.is_current_stream_capturing = lambda: capturing[0]
    for config in (None, None, None, None, fast):
        launch.run_stage(blocks, weight, bias, GELU, config)
        found.append([seen._replace(parameters="")._asdict() for seen in RECORDER.take()])
        del capturing[:1]
        capturing = capturing or [False]
    return {"calls": found, "candidates": len(selection.contenders(*what)), "ready": len(launch._ready)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(globals()[sys.argv[2]](), sys.stdout)
