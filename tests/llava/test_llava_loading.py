"""Broken if this fails: a model on several devices, in few bits or over processes is not the model, or not allowed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

import llava_integration as li
from llava_integration.core.model import _without_projector
from tests.llava import build
from tests.support.processes import python

SCRIPT = str(Path(__file__).with_name("two_processes.py"))


def model_inputs(dtype):
    ids, mask = build.prompt([1, 2])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": build.pixels(3, dtype)}


def logits(model, dtype):
    inputs = model_inputs(dtype)
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].float()


class TestQuantised:
    """The projector is what the model is about: it stays in 16 bit, whatever the rest is loaded in."""

    @pytest.mark.parametrize("skip", [None, ["lm_head"]], ids=["default", "own list"])
    @pytest.mark.parametrize("part", ["whole", "base"])
    def test_every_quantizer_is_told_to_leave_the_projector(self, stf, part, skip):
        """The list and the matching that all quantizers of transformers share."""
        model = stf if part == "whole" else stf.model
        config = _without_projector(BitsAndBytesConfig(llm_int8_skip_modules=skip))
        patterns = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        kept = {name for name in linear if not should_convert_module(name, patterns)}
        projector = {name for name in linear if "multi_modal_projector" in name}
        assert len(projector) == 4
        assert projector <= kept
        assert kept - projector == {"lm_head"} & set(linear), "the rest is quantised as usual"

    @pytest.mark.parametrize("bits", [8, 4])
    def test_bitsandbytes(self, tmp_path, bits):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        # Whole blocks of 64: on a CPU with AVX512-BF16 bitsandbytes packs 4 bit weights and takes no other widths.
        vision = build.clip(hidden_size=64, intermediate_size=128)
        text = build.llama(hidden_size=64, intermediate_size=128)
        stf = build.stf(torch.float16, vision=vision, text=text)
        stf.save_pretrained(tmp_path / "full")
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float16)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "full", quantization_config=config)
        self.check(stf, loaded, (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit))
        loaded.save_pretrained(tmp_path / "few")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "few")
        assert torch.equal(logits(again, torch.float16), logits(loaded, torch.float16))

    def test_torchao(self, tmp_path):
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        stf = build.stf(torch.bfloat16)
        stf.save_pretrained(tmp_path)
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)
        assert "Int8" in type(loaded.model.language_model.layers[0].self_attn.q_proj.weight).__name__
        self.check(stf, loaded, torch.nn.Linear)

    @pytest.mark.parametrize("kept", ["buffers", "nothing"])
    def test_a_projector_without_parameters(self, stf, kept):
        """Whoever quantises its linears all the same, as torch.ao does, gets an answer."""

        class Packed(torch.nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.weight, self.bias = linear.weight.detach(), linear.bias.detach()
                if kept == "buffers":
                    self.register_buffer("scale", torch.ones(1))

            def forward(self, x):
                return torch.nn.functional.linear(x, self.weight, self.bias)

        expected = logits(stf, torch.float64)
        for part in (stf.model.multi_modal_projector.mbtf, stf.model.multi_modal_projector.stf):
            part.linear_1, part.linear_2 = Packed(part.linear_1), Packed(part.linear_2)
        assert torch.allclose(logits(stf, torch.float64), expected, atol=1e-10)

    @staticmethod
    def check(stf, loaded, quantised):
        assert isinstance(loaded.model.language_model.layers[0].self_attn.q_proj, quantised)
        ours, theirs = (model.model.multi_modal_projector.state_dict() for model in (loaded, stf))
        assert all(torch.equal(value, theirs[name]) and value.dtype == stf.dtype for name, value in ours.items())
        assert all(
            type(module) is not torch.nn.Linear or module.weight.dtype == stf.dtype
            for module in loaded.model.multi_modal_projector.modules()
        )
        expected = logits(stf, stf.dtype)
        assert (logits(loaded, stf.dtype) - expected).abs().max() < 0.3 * expected.abs().max()


class TestDeviceMap:
    """The tower and the projector stay whole; every part may live elsewhere."""

    def test_tower_and_projector_are_not_split(self, tmp_path):
        """Room for half a tower a device: accelerate must move on rather than cut."""
        accelerate = pytest.importorskip("accelerate")
        for vision, name in ((build.clip(), "CLIPVisionModel"), (build.siglip(), "SiglipVisionModel")):
            config = build.stf(torch.float32, vision=vision, vision_feature_layer=[5, 3]).config
            with torch.device("meta"):
                stf = li.LlavaStfForConditionalGeneration(config)
            assert {name, "CompactTokenProjector"} <= set(stf._no_split_modules)
            assert ({"CLIPVisionModel", "SiglipVisionModel"} - {name}).isdisjoint(stf._no_split_modules)
            tower = sum(p.numel() * p.element_size() for p in stf.model.vision_tower.parameters())
            memory = {0: tower * 3 // 4, 1: 2 * tower, "cpu": 10**9}
            plan = accelerate.infer_auto_device_map(stf, memory, no_split_module_classes=list(stf._no_split_modules))
            for part in ("model.vision_tower", "model.multi_modal_projector"):
                assert part in plan, plan
                assert not any(key.startswith(f"{part}.") for key in plan)

    @pytest.mark.parametrize("away", ["vision_tower", "multi_modal_projector", "language_model"])
    def test_a_part_on_disk(self, tmp_path, away):
        pytest.importorskip("accelerate")
        stf = build.stf(torch.float32)
        stf.save_pretrained(tmp_path / "model")
        parts = ("vision_tower", "multi_modal_projector", "language_model")
        device_map = {f"model.{part}": "disk" if part == away else "cpu" for part in parts} | {"lm_head": "cpu"}
        options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", **options)
        assert all(parameter.is_meta for parameter in getattr(loaded.model, away).parameters())
        assert torch.allclose(logits(loaded, torch.float32), logits(stf, torch.float32), atol=1e-5)
        inputs = model_inputs(torch.float32)
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        assert torch.equal(loaded.generate(**inputs, **options), stf.generate(**inputs, **options))


class TestTensorParallel:
    """The language model is split as the stock LLaVA's, the projector is whole on every rank."""

    def test_the_plan_is_the_stock_one(self, stf, stock):
        assert stf.tp_plan == stock.tp_plan
        assert any(name.endswith("q_proj") for name in stf.tp_plan)
        assert not any("multi_modal_projector" in name or "vision_tower" in name for name in stf.tp_plan)

    def test_two_processes_give_the_logits_of_one(self, tmp_path):
        pytest.importorskip("accelerate")
        stf, inputs = build.stf(torch.float32), model_inputs(torch.float32)
        stf.save_pretrained(tmp_path)
        torch.save(inputs, tmp_path / "inputs.pt")
        run = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", SCRIPT]
        result = python(*run, str(tmp_path), timeout=240, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
        assert result.returncode == 0, result.stderr
        expected = logits(stf, torch.float32)
        shapes = {name: list(p.shape) for name, p in stf.model.multi_modal_projector.named_parameters()}
        for rank in range(2):
            found = torch.load(tmp_path / f"rank-{rank}.pt")
            assert found["query"] == [24, 48], "the language model is not split"
            assert found["projector"] == shapes
            assert torch.allclose(found["logits"][inputs["attention_mask"].bool()], expected, atol=1e-5)
