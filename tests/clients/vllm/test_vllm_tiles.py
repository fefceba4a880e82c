"""If this fails, vLLM does not answer from a LLaVA-NeXT or LLaVA-OneVision folder of ours as transformers does."""

import pytest
import torch
from clients.vllm import folders
from clients.vllm.test_vllm_engine import answers, engine, settings  # noqa: F401

from llava_integration.convert import convert_llava
from tests.llava import build, tiled

WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.mark.parametrize("family", ["next", "onevision"])
def test_by_the_transformers_backend(tmp_path, family):
    """One image, two, none; from the code that --auto-map wrote."""
    source, made = tmp_path / "stock", tmp_path / "stf"
    sizes = {"text": build.llama(**WIDE, num_key_value_heads=4)}
    sizes["vision"] = (
        build.clip(**WIDE) if family == "next" else build.siglip(image_size=130, vision_use_head=False, **WIDE)
    )
    stock = tiled.MODELS[family](torch.float32, **sizes)
    stock.save_pretrained(source)
    build.tokenizer(padding_side="left").save_pretrained(source)
    tiled.processor(stock).image_processor.save_pretrained(source)
    convert_llava(source, made, auto_map=True)
    with engine(made, model_impl="transformers", trust_remote_code=True, max_model_len=256) as llm:
        assert answers(llm) == folders.expected(made)
