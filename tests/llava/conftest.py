"""Small random LLaVAs, an in-memory processor and prompts for the tests of llava_integration."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import llava_integration as li
import reference
from llava_integration.core import projector

WORDS = ["USER", "ASSISTANT", "what", "is", "in", "the", "picture", "a", "cat", "and", "dog", ":"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
IMAGE_TOKEN = SPECIAL.index("<image>")
VOCAB = 64
PIXELS, PATCH = 56, 14  # a 4x4 grid


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": PIXELS}
VISION |= {"patch_size": PATCH}
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def clip_config(**changes):
    return CLIPVisionConfig(**{"num_hidden_layers": 6, "projection_dim": 32} | VISION | changes)


def siglip_config(**changes):
    return SiglipVisionConfig(**{"num_hidden_layers": 5} | VISION | changes)


def text_config(**changes):
    return LlamaConfig(**{"max_position_embeddings": 512} | TEXT | changes)


def make_stock(dtype=torch.float64, vision=None, text=None, **changes):
    torch.manual_seed(0)
    options = {
        "vision_config": vision or clip_config(),
        "text_config": text or text_config(),
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": (PIXELS // PATCH) ** 2,
    }
    model = LlavaForConditionalGeneration(LlavaConfig(**options | changes)).eval().to(dtype)
    for parameter in model.parameters():  # zero biases and unit norms hide mistakes
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def make_stf(dtype=torch.float64, vision=None, text=None, **changes):
    torch.manual_seed(0)
    options = {
        "vision_config": vision or clip_config(),
        "text_config": text or text_config(),
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": [5, 3, 1],
    }
    model = li.LlavaStfForConditionalGeneration(li.LlavaStfConfig(**options | changes)).eval().to(dtype)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def run(model, ids, pixels, mask=None, grad=False):
    with torch.set_grad_enabled(grad):
        return model(input_ids=ids, pixel_values=pixels, attention_mask=mask)


def with_reference(model, monkeypatch):
    """The same model and weights with the projector of reference/."""
    monkeypatch.setattr(projector, "CompactTokenProjector", reference.CompactTokenProjector)
    other = type(model)(model.config).eval().to(model.dtype)
    other.load_state_dict(model.state_dict())
    assert type(other.model.multi_modal_projector) is reference.CompactTokenProjector
    return other


def generate(model, ids, mask, pixels, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models this small run ten times slower when two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stock():
    return make_stock()


@pytest.fixture
def stf():
    return make_stf()


@pytest.fixture
def build():
    """The factories, for tests that choose their own sizes, and the calls of what they made."""
    return SimpleNamespace(
        stock=make_stock,
        stf=make_stf,
        clip=clip_config,
        siglip=siglip_config,
        text=text_config,
        pixels=make_pixels,
        prompt=make_prompt,
        tokenizer=make_tokenizer,
        image=make_image,
        run=run,
        generate=generate,
        with_reference=with_reference,
        image_token=IMAGE_TOKEN,
    )


def make_pixels(images, dtype=torch.float64, size=PIXELS):
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_prompt(images, per_image=4, length=None):
    """ids [B, S] and attention mask, `images[b]` images in prompt b, left-padded, text around every image."""
    generator = torch.Generator().manual_seed(2)

    def text(count):
        return torch.randint(len(SPECIAL), VOCAB, (count,), generator=generator).tolist()

    prompts = []
    for count in images:
        prompt = [2, *text(2)]
        for _ in range(count):
            prompt += [IMAGE_TOKEN] * per_image + text(3)
        prompts.append(prompt)
    length = length or max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def make_tokenizer(with_image=True):
    words = SPECIAL + WORDS if with_image else SPECIAL[:-1] + WORDS
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL if with_image else SPECIAL[:-1])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def make_image(seed=0, size=(80, 60)):
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.fixture
def processor():
    images = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    template = (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    )
    template += "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    return li.LlavaStfProcessor(images, make_tokenizer(), patch_size=PATCH, chat_template=template)
