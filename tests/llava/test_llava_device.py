"""Broken if this fails: the image path waits for the device, or a GPU gives other logits.

Without a GPU tensors on the meta device stand in: reading a value of one, as every synchronisation does, raises.
"""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import llava_integration as li
from llava_integration.core import insertion
from stf_kernels import use_backend
from tests.llava import build


@pytest.fixture
def on_meta():
    """Model, ids [2, 10] with an image in each and pixels, without values."""
    stf, (ids, _), pixels = build.stf(torch.float32), build.prompt([1, 1]), build.pixels(2, torch.float32)
    return stf.to("meta"), ids.to("meta"), pixels.to("meta")


class TestNoValueIsRead:
    def test_meta_tensors_notice(self, on_meta):
        for read in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero, bool):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read(on_meta[1][0, 0] == 1)

    @pytest.mark.parametrize("kind", ["stf", "stock"])
    def test_prefill_runner(self, kind):
        model = getattr(build, kind)(torch.float32).to("meta")
        ids, _ = build.prompt([1, 1], model.config.image_seq_length)
        runner = li.PrefillRunner(model, *ids.shape)
        for _ in range(2):
            assert runner(ids.to("meta"), build.pixels(2, torch.float32).to("meta")).shape == (2, 64)

    @pytest.mark.parametrize("grad", [False, True], ids=["in place", "plain"])
    def test_forward_reads_the_count_of_image_tokens_and_nothing_else(self, on_meta, monkeypatch, grad):
        """As the stock forward does, once; under capture not even that. Without a cache the language model reads."""
        stf, ids, pixels = on_meta
        counted = []
        monkeypatch.setattr(insertion, "torch_compilable_check", lambda *_: counted.append(1))
        with torch.set_grad_enabled(grad):
            assert stf(input_ids=ids, pixel_values=pixels, use_cache=True).logits.shape == (2, 10, 64)
            assert counted == [1]
            monkeypatch.setattr(insertion, "is_captured", lambda: True)
            stf(input_ids=ids, pixel_values=pixels, use_cache=True)
            assert counted == [1]


def synchronisations(call):
    """How often `call` waits for the GPU."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("way", ["forward", "generate"])
    def test_eager_waits_no_more_than_the_stock_model(self, way):
        found = {}
        for kind in ("stock", "stf"):
            model = getattr(build, kind)(torch.float32).cuda()
            ids, mask = (t.cuda() for t in build.prompt([1, 1], model.config.image_seq_length))
            inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": build.pixels(2, torch.float32).cuda()}
            options = {"max_new_tokens": 2, "do_sample": False} if way == "generate" else {}
            run = getattr(model, way)
            with torch.no_grad():
                found[kind] = synchronisations(lambda run=run, options=inputs | options: run(**options))
        assert found["stf"] <= found["stock"], found

    def test_images_are_written_under_capture(self):
        """Into inputs_embeds, from other pixels at every replay."""
        stf = build.stf(torch.float32).cuda()
        ids, pixels = build.prompt([1, 1])[0].cuda(), build.pixels(2, torch.float32).cuda()
        embeds, stream = torch.zeros(*ids.shape, 48, device="cuda"), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                stf.model._write_images(ids, embeds, pixels, None)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            stf.model._write_images(ids, embeds, pixels, None)
        pixels.copy_(pixels.flip(0))
        embeds.zero_()
        graph.replay()
        with torch.no_grad():
            expected = stf.model.project_images(pixels).flatten(0, 1)
        assert torch.allclose(embeds[ids == build.IMAGE_TOKEN], expected, rtol=1e-3, atol=1e-3)
        assert not embeds[ids != build.IMAGE_TOKEN].any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("attention", ["flash", "memory efficient", "eager", "flash_attention_2"])
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_logits(self, dtype, attention, backend):
        """No further from float32 on the CPU than twice what plain attention and plain torch are."""
        if attention == "flash_attention_2":
            pytest.importorskip("flash_attn")
        stf, (ids, _), pixels = build.stf(torch.float32, **build.wide()), build.prompt([2, 2]), build.pixels(4)
        with torch.no_grad():
            exact = stf(input_ids=ids, pixel_values=pixels.float()).logits
            stf = stf.to("cuda", dtype)
            inputs = {"input_ids": ids.cuda(), "pixel_values": pixels.to("cuda", dtype)}

            def error():
                return (stf(**inputs).logits.float().cpu() - exact).square().mean().sqrt()

            with use_backend("torch"), sdpa_kernel(SDPBackend.MATH):
                plain = error()
            kernels = {"flash": SDPBackend.FLASH_ATTENTION, "memory efficient": SDPBackend.EFFICIENT_ATTENTION}
            if attention not in kernels:
                stf.set_attn_implementation(attention)
            with use_backend(backend), sdpa_kernel(kernels.get(attention, SDPBackend.MATH)):
                assert error() <= 2 * plain + 1e-4
