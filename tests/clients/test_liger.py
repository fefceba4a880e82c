"""If this fails, Liger-Kernel does not know LLaVA-STF, or a model that it has patched gives other numbers."""

import copy
import os

import pytest
import torch
from liger_kernel.transformers import monkey_patch
from support.processes import python

import llava_integration  # noqa: F401
from tests.llava import build

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLAIN = {"rope": False, "rms_norm": False, "swiglu": False}  # whose kernels need a GPU, or the interpreter


@pytest.fixture
def batch():
    ids, mask = build.prompt([1, 2])
    labels = ids.masked_fill((ids == build.IMAGE_TOKEN) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": build.pixels(3, torch.float32), "labels": labels}


def patched(model, **options):
    """A copy of `model`, patched. Some patches reach the modules of every Llama: the model itself runs before this."""
    other = copy.deepcopy(model)
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=other, **options)
    assert other.forward.__func__ is monkey_patch.llava_lce_forward
    return other


def test_a_patched_model_gives_the_same(batch):
    model = build.stf(torch.float32)
    inputs = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    with torch.no_grad():
        one, answer = model(**batch), build.generate(model, *inputs)
        other = patched(model, **PLAIN)
        two = other(**batch)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(build.generate(other, *inputs), answer)


@pytest.mark.skipif(not INTERPRETED, reason="run by the test below, in a process with TRITON_INTERPRET=1")
def test_with_its_kernels(batch):
    """Loss and gradients with Liger's rope and fused loss, in Triton's interpreter."""
    model = build.stf(torch.float32).train()
    expected = model(**batch).loss
    expected.backward()
    other = patched(model, rms_norm=False, swiglu=False)  # these two the interpreter cannot run
    other.zero_grad()
    loss = other(**batch).loss
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-4)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, two.grad, rtol=1e-2, atol=1e-4), name


def test_with_its_kernels_in_the_interpreter():
    test = "tests/clients/test_liger.py::test_with_its_kernels"
    result = python("-m", "pytest", "-q", test, TRITON_INTERPRET="1", timeout=300)
    assert " 1 passed" in f" {result.stdout}".replace("\n", " "), result.stdout[-3000:]
