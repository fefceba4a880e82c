"""If this fails, `kernels` does not load this package, or what it puts into a model is another model."""

import json

import pytest
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
from support.processes import python

import stf_kernels
from llava_integration.convert import auto_map
from llava_integration.core import plain_projector
from llava_integration.core.register import family_of
from tests.llava import build

SIZES = {"mbtf_hidden_dim": 24, "stf_hidden_dim": 40, "merge_size": 2, "skip_tokens": 1, "mbtf": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hub") / "stf-kernels"
    assert python(".ci/hub.py", str(made)).returncode == 0
    return made


@pytest.fixture
def kernel(folder):
    return get_local_kernel(folder)


def blocks():
    return [torch.randn(2, 17, 8, requires_grad=True) for _ in range(3)]


def put_into(layer, folder, mode):
    name = "CompactTokenProjector"
    mapping = {name: {"cpu": LocalLayerRepository(folder, layer_name=name)}}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        return kernelize(layer, mode=mode, device="cpu", use_fallback=False)


@pytest.fixture(params=[plain_projector.CompactTokenProjector, stf_kernels.CompactTokenProjector], ids=["plain", "stf"])
def layer(request, monkeypatch):
    monkeypatch.setattr(stf_kernels.CompactTokenProjector, "kernel_layer_name", "CompactTokenProjector", raising=False)
    return request.param(3, 8, 12, truncate=False, activation="silu", **SIZES)


def calls(kernel, monkeypatch):
    """The operator calls of the hub's copy, as they happen."""
    seen, operators = [], kernel.layers.operators
    operator = operators.compact_token_projector
    monkeypatch.setattr(operators, "compact_token_projector", lambda *a: seen.append(1) or operator(*a))
    return seen


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE])
def test_a_layer_is_replaced_by_the_fused_one(layer, folder, kernel, mode, monkeypatch):
    x, seen = blocks(), calls(kernel, monkeypatch)
    tensors = [*x, *layer.parameters()]
    expected = layer(x, (4, 4))
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    put_into(layer, folder, mode)
    got = layer(x, (4, 4))
    assert len(seen) == 1
    assert torch.allclose(got, expected, atol=1e-6)
    for one, other in zip(torch.autograd.grad(got.square().sum(), tensors), gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_it_compiles_without_a_graph_break(layer, folder):
    x = blocks()
    expected = put_into(layer, folder, Mode.TRAINING | Mode.TORCH_COMPILE)(x, (4, 4))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, (4, 4)), expected, atol=1e-6)


def test_what_cannot_be_read_is_called(layer, folder, kernel, monkeypatch):
    """A hook on a child or on a linear, rows to be written: the layer's own forward, with all its effects."""
    x, seen, hooked = [block.detach() for block in blocks()], calls(kernel, monkeypatch), []
    put_into(layer, folder, Mode.INFERENCE)
    with torch.no_grad():
        expected, out = layer(x, (4, 4)), torch.zeros(8, 12)
        layer(x, (4, 4), out=out, rows=torch.arange(8))
        assert torch.allclose(out, expected.flatten(0, 1), atol=1e-6)
        for child in (layer.stf, layer.mbtf.linear_2):
            handle = child.register_forward_hook(lambda *_: hooked.append(1))
            assert torch.allclose(layer(x, (4, 4)), expected, atol=1e-6)
            handle.remove()
    assert len(hooked) == 2
    assert len(seen) == 1


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules |= {"llava_integration": None, "stf_kernels": None}
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = torch.load(sys.argv[2])
projector = model.model.multi_modal_projector
answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
print(json.dumps([type(projector).__module__, "kernels" in sys.modules, answer]))
"""


def test_a_folder_without_this_package_takes_them_from_the_hub(folder, kernel, tmp_path):
    """Where STF_KERNELS_HUB says so, which is never a default: without it `kernels` is not even imported."""
    ids, _ = build.prompt([1])
    model, inputs = build.stf(torch.float32), {"input_ids": ids, "pixel_values": build.pixels(1, torch.float32)}
    model.save_pretrained(tmp_path / "model")
    auto_map.write_auto_map(tmp_path / "model", family_of(model.config))
    torch.save(inputs, tmp_path / "inputs.pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()

    def load(**environment):
        environment |= {"HF_MODULES_CACHE": str(tmp_path / f"modules-{len(environment)}"), "PYTHONPATH": None}
        result = python("-c", WITHOUT_THE_PACKAGE, str(tmp_path / "model"), str(tmp_path / "inputs.pt"), **environment)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1]), result.stderr

    (module, imported, answer), log = load()
    assert module.endswith("llava_stf_plain_projector")
    assert not imported
    assert answer == expected
    assert "its projector is not fused" in log
    (module, imported, answer), log = load(STF_KERNELS_HUB="some/where@1", LOCAL_KERNELS=f"some/where={folder}")
    assert module == f"{kernel.__name__}.modules"
    assert answer == expected
    assert "not fused" not in log
