"""Broken if this fails: transformers' own common tests fail on LLaVA-STF and not on the stock LLaVA of the same tower.

ModelTesterMixin and ProcessorTesterMixin of the installed version's sdist, on both. SKIPPED says why a test may be
skipped, by the reason that the suite gives; any other skip is a failure (conftest.py).
"""

import unittest
from unittest.mock import patch

import torch
from common.generation.test_utils import GenerationTesterMixin
from common.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from common.test_processing_common import ProcessorTesterMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import llava_integration as li
from tests.llava import build

SKIPPED = {
    r"test requires|test is slow": "hardware and packages that are not there: accelerators, flash attention",
    r"(video_processor|feature_extractor) attribute not present": "frames are prepared as images are; no sound",
    r"no (video|audio) processor|count video tokens": "transformers' own need torchvision; ours: tests/llava",
    r"no chat template": "this tokenizer has none; tests/llava/test_llava_processor.py has one",
    r"no _keep_in_fp32_modules": "nothing is kept in fp32",
    r"experts|grouped_mm|router_logits|partial rope|axial RoPE": "a LLaVA has none of these",
    r"sliding window|encoder-decoder|position embeddings": "nor of these",
    r"does not support SDPA|Not a prioritized model": "said of every composite model, of the control as well",
}


class Tester:
    """What the mixin asks: a small configuration and inputs for it, one image in each of three prompts."""

    batch_size, seq_length, is_training = 3, 24, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 48

    def __init__(self, parent, config_class):
        self.parent, self.config_class = parent, config_class
        self.vision_config = build.clip(num_hidden_layers=2).to_dict()

    def get_config(self):
        layers = (
            {"vision_feature_layer": [1, 2]} if self.config_class is li.LlavaStfConfig else {"image_seq_length": 16}
        )
        options = build.options(vision=build.clip(num_hidden_layers=2), text=build.llama(), **layers)
        return self.config_class(**options)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        text = ids_tensor([self.batch_size, self.seq_length - config.image_seq_length], build.VOCAB - 6) + 5
        images = torch.full((self.batch_size, config.image_seq_length), build.IMAGE_TOKEN)
        ids = torch.cat([images, text], dim=1)
        pixels = floats_tensor([self.batch_size, 3, build.PIXELS, build.PIXELS])
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class Model(ModelTesterMixin, GenerationTesterMixin):
    _is_composite = True
    test_all_params_have_gradient = False  # the tower's last layer is read by nobody
    config_class: type

    def setUp(self):
        self.model_tester = Tester(self, self.config_class)

    def _video_features_prepare_config_and_inputs(self):
        """A video of one frame in each prompt."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {"pixel_values_videos": inputs["pixel_values"].unsqueeze(1)}


class Processor(ProcessorTesterMixin):
    @classmethod
    def _setup_image_processor(cls):
        side = {"height": build.PIXELS, "width": build.PIXELS}
        return CLIPImageProcessorPil(size={"shortest_edge": build.PIXELS}, crop_size=side)

    @classmethod
    def _setup_tokenizer(cls):
        """Byte by byte, so that what is decoded is what was encoded."""
        words = [*build.SPECIAL, "<video>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        made = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.add_special_tokens(words[: len(build.SPECIAL) + 1])
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")

    @staticmethod
    def prepare_processor_dict():
        return {
            "patch_size": build.PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }


class StfModelTest(Model, unittest.TestCase):
    config_class = li.LlavaStfConfig
    all_model_classes = (li.LlavaStfModel, li.LlavaStfForConditionalGeneration)

    def test_reverse_loading_mapping(self):
        """In the names of the first checkpoints, which are written when asked; the base model alone has none."""
        for cls in self.all_model_classes:
            asked = patch.dict(cls.save_pretrained.__kwdefaults__, save_original_format=True)
            asked.start()
            self.addCleanup(asked.stop)
        super().test_reverse_loading_mapping(skip_base_model=True)


class StockModelTest(Model, unittest.TestCase):
    config_class = LlavaConfig
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)


class StfProcessorTest(Processor, unittest.TestCase):
    processor_class = li.LlavaStfProcessor

    def test_processor_with_multiple_inputs(self):
        self.video_token = ""  # gives no videos where there is no video processor besides that of images
        super().test_processor_with_multiple_inputs()

    def test_replacement_offsets(self):
        self.video_token = ""
        super().test_replacement_offsets()


class StockProcessorTest(Processor, unittest.TestCase):
    processor_class = LlavaProcessor
