"""Broken if this fails: transformers' own common tests fail on a family of STF models and not on its stock one.

ModelTesterMixin and ProcessorTesterMixin of the installed version's sdist, on both. SKIPPED says why a test may be
skipped, by the reason that the suite gives; any other skip is a failure (conftest.py).
"""

import unittest
from unittest.mock import patch

import torch
import transformers
from common.generation.test_utils import GenerationTesterMixin
from common.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from common.test_processing_common import ProcessorTesterMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

import llava_integration as li
from tests.llava import build, tiled

SKIPPED = {
    r"test requires|test is slow": "hardware and packages that are not there: accelerators, flash attention",
    r"(video_processor|feature_extractor) attribute not present": "frames are prepared as images are; no sound",
    r"no (video|audio) processor|count video tokens": "transformers' own need torchvision; ours: tests/llava",
    r"no chat template": "this tokenizer has none; tests/llava/test_llava_processor.py has one",
    r"no _keep_in_fp32_modules": "nothing is kept in fp32",
    r"experts|grouped_mm|router_logits|partial rope|axial RoPE": "a LLaVA has none of these",
    r"sliding window|encoder-decoder|position embeddings": "nor of these",
    r"does not support SDPA|Not a prioritized model": "said of every composite model, of the control as well",
    r"support `_get_num_multimodal_tokens` yet": "of the control of LLaVA-OneVision, which is a class of these tests",
    r"does not support output_attentions|without breaking BC": "said of the control as well",
}
SIDE = build.PIXELS // build.PATCH
SQUARE = {"height": build.PIXELS, "width": build.PIXELS}
PINPOINTS = [[build.PIXELS, build.PIXELS], [build.PIXELS, 2 * build.PIXELS]]


class Tester:
    """What the mixin asks: a small configuration and inputs for it, one image in each of three prompts."""

    batch_size, is_training = 3, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 48

    def __init__(self, parent, config_class):
        self.parent, self.config_class = parent, config_class
        self.compact = hasattr(config_class, "spatial_merge_size")
        self.tiled = hasattr(config_class, "image_grid_pinpoints")
        tower = build.siglip if "Onevision" in config_class.__name__ else build.clip
        self.vision_config = tower(num_hidden_layers=2).to_dict()
        side = SIDE // 2 if self.compact else SIDE
        # In tiles: the small copy of the whole picture and one tile, with a newline behind each of its rows.
        self.tokens = side**2 + side * (side + 1) if self.tiled else side**2
        self.seq_length = self.tokens + 8

    def get_config(self):
        layers = {"vision_feature_layer": [1, 2], "spatial_merge_size": 2}
        grids = {"image_grid_pinpoints": PINPOINTS[:1], "video_token_index": tiled.VIDEO_TOKEN}
        options = {"vision": self.vision_config} | (layers if self.compact else {}) | (grids if self.tiled else {})
        if not self.compact and not self.tiled:
            options["image_seq_length"] = self.tokens
        return self.config_class(**build.options(**options))

    def prepare_config_and_inputs_for_common(self):
        text = ids_tensor([self.batch_size, self.seq_length - self.tokens], build.VOCAB - 6) + 5
        ids = torch.cat([torch.full((self.batch_size, self.tokens), build.IMAGE_TOKEN), text], dim=1)
        images = [self.batch_size, 2] if self.tiled else [self.batch_size]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = floats_tensor([*images, 3, build.PIXELS, build.PIXELS])
        if self.tiled:
            inputs["image_sizes"] = torch.tensor(PINPOINTS[:1] * self.batch_size)
        return self.get_config(), inputs


class Model(ModelTesterMixin, GenerationTesterMixin):
    _is_composite = True
    test_all_params_have_gradient = False  # the tower's last layer is read by nobody
    config_class: type

    def setUp(self):
        self.model_tester = Tester(self, self.config_class)
        self.skip_test_image_features_output_shape = self.model_tester.tiled  # the tower sees tiles, not images

    def _video_features_prepare_config_and_inputs(self):
        """A video of one frame for each prompt."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        pixels = inputs["pixel_values"]
        return config, {"pixel_values_videos": pixels[:, :1] if pixels.ndim == 5 else pixels.unsqueeze(1)}


class StfModel(Model):
    def test_reverse_loading_mapping(self):
        """In the names of the first checkpoints, which are written when asked; the base model alone has none."""
        for cls in self.all_model_classes:
            asked = patch.dict(cls.save_pretrained.__kwdefaults__, save_original_format=True)
            asked.start()
            self.addCleanup(asked.stop)
        super().test_reverse_loading_mapping(skip_base_model=True)


class Processor(ProcessorTesterMixin):
    family: str

    @classmethod
    def _setup_image_processor(cls):
        if cls.family == "Llava":
            return CLIPImageProcessorPil(size={"shortest_edge": build.PIXELS}, crop_size=SQUARE)
        kind = getattr(transformers, f"{cls.family}ImageProcessorPil")
        return kind(size=SQUARE, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)

    @classmethod
    def _setup_tokenizer(cls):
        """Byte by byte, so that what is decoded is what was encoded."""
        words = [*build.SPECIAL, "<video>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        made = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.add_special_tokens(words[: len(build.SPECIAL) + 1])
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")

    @classmethod
    def prepare_processor_dict(cls):
        if cls.family == "LlavaOnevision":
            return {"num_image_tokens": SIDE**2, "vision_feature_select_strategy": "full"}
        options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return options | {"patch_size": build.PATCH}

    def prepare_videos_inputs(self, batch_size=None):
        """None for a family without videos: its stock processor drops them without a word, ours refuses them."""
        return None if self.family == "LlavaNext" else super().prepare_videos_inputs(batch_size)

    def test_processor_with_multiple_inputs(self):
        self.video_token = ""  # gives no videos where there is no video processor besides that of images
        super().test_processor_with_multiple_inputs()

    def test_replacement_offsets(self):
        self.video_token = ""
        super().test_replacement_offsets()


class StfProcessor(Processor):
    def test_no_redundant_default_kwargs(self):
        if self.family == "LlavaNext":
            self.skipTest("the stock class's own default, which may stay there without breaking BC")
        super().test_no_redundant_default_kwargs()


def cases(name, family, classes, model, processor):
    """Two test cases of one family, named after it."""
    config, base, generator, processor_class = classes
    kinds = {"config_class": config, "all_model_classes": (base, generator)}
    yield type(f"{name}ModelTest", (model, unittest.TestCase), kinds)
    kinds = {"family": family, "processor_class": processor_class}
    yield type(f"{name}ProcessorTest", (processor, unittest.TestCase), kinds)


KINDS = ("Config", "Model", "ForConditionalGeneration", "Processor")
for family in ("Llava", "LlavaNext", "LlavaOnevision"):
    stock = [getattr(transformers, family + kind) for kind in KINDS]
    if family == "LlavaOnevision":
        stock[-1] = tiled.OnevisionProcessor
    stf = [getattr(li, f"{family}Stf{kind}") for kind in KINDS]
    for case in (
        *cases(family, family, stock, Model, Processor),
        *cases(f"{family}Stf", family, stf, StfModel, StfProcessor),
    ):
        globals()[case.__name__] = case
del case  # not to be collected a second time
