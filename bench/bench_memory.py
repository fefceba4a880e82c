"""Peak memory of the projector at batch 8 in fp32, LLaVA-1.5's sizes on every device: fused beside reference.

Prints both. Forward: fails when the fused chain is not below, because a concatenation or an unfolded copy has come
back. Forward + backward, tower frozen, all gradients kept: prints the difference, and beside it the concatenation
and the unfolded copy together, which it is to reach; torch.compile of the reference too, where that can be built.
Weights and inputs are there before and are not counted; see bench/memory.py for what is.
"""

from __future__ import annotations

import pytest
import torch

import reference
import stf_kernels
from bench.memory import MB, peak_bytes
from bench.problems import LLAVA, build_projector, can_compile, random_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 8


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward_backward"])
def test_peak_memory(benchmark, training, capsys):
    blocks = random_blocks(LLAVA, BATCH, device=DEVICE, dtype=torch.float32, seed=2)
    fused = build_projector(LLAVA, stf_kernels.CompactTokenProjector, device=DEVICE, dtype=torch.float32, seed=1)
    plain = reference.CompactTokenProjector(
        LLAVA.blocks, LLAVA.dim, LLAVA.out_dim, merge_size=LLAVA.merge, skip_tokens=1, device="meta"
    )
    plain.load_state_dict(dict(fused.named_parameters()), assign=True)

    def run(module: torch.nn.Module) -> torch.Tensor:
        if not training:
            with torch.no_grad():
                return module(blocks)
        module.requires_grad_(True)
        loss = module(blocks).square().mean()
        gradients = torch.autograd.grad(loss, list(module.parameters()))  # the tower is frozen: no blocks here
        del gradients
        return loss.detach()

    theirs, reference_peak = peak_bytes(lambda: run(plain), DEVICE)
    ours, fused_peak = benchmark.pedantic(lambda: peak_bytes(lambda: run(fused), DEVICE), rounds=1)
    needed = LLAVA.copied_bytes(BATCH, 4)
    benchmark.extra_info.update(
        fused_mb=fused_peak / MB, reference_mb=reference_peak / MB, copies_mb=needed / MB, device=DEVICE
    )
    third = ""
    if training and can_compile(DEVICE):
        compiled = torch.compile(plain, dynamic=False)
        run(compiled)  # builds it
        same, compiled_peak = peak_bytes(lambda: run(compiled), DEVICE)
        torch.testing.assert_close(same, theirs, rtol=1e-3, atol=1e-4)
        benchmark.extra_info["compile_mb"] = compiled_peak / MB
        third = f"; torch.compile {compiled_peak / MB:.2f} MB"
    what = "forward + backward, tower frozen" if training else "forward"
    with capsys.disabled():
        print(
            f"\npeak memory, {what}, fp32, batch {BATCH}, {DEVICE}: "
            f"fused {fused_peak / MB:.2f} MB, reference {reference_peak / MB:.2f} MB, difference "
            f"{(reference_peak - fused_peak) / MB:+.2f} MB (concatenation and unfold: {needed / MB:.2f} MB){third}"
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    if not training:
        assert fused_peak < reference_peak
