"""Broken if this fails: a converted folder does not load, prompt or describe itself as its users expect."""

import io
import json
import re
import shutil

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from llava_integration.convert import convert_llava, convert_official
from llava_integration.convert.folder import generation_settings
from tests.convert import checkpoints as ck
from tests.llava import build
from tests.support.processes import python

LOAD = """
import json, sys, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from PIL import Image
folder, options = sys.argv[1], json.loads(sys.argv[2])
if not options:
    import llava_integration
model = AutoModelForImageTextToText.from_pretrained(folder, **options)
base = AutoModel.from_pretrained(folder, **options)
processor = AutoProcessor.from_pretrained(folder, **options)
inputs = processor(images=Image.new("RGB", (70, 40), "red"), text="USER: <image> what", return_tensors="pt")
print(json.dumps({
    "classes": [type(x).__name__ for x in (model, base, processor)],
    "tokens": model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist(),
}))
if len(sys.argv) > 3:
    model.save_pretrained(sys.argv[3])
    processor.save_pretrained(sys.argv[3] + "-processor")
"""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)

# None in sys.modules: the import fails as that of a package that is not there.
HIDE = "import sys; sys.modules |= dict.fromkeys(('llava_integration', 'stf_kernels', 'reference')); "


def load(folder, *more, cache, installed=True, **options):
    script = LOAD if installed else HIDE + LOAD
    words = ("-c", script, str(folder), json.dumps(options), *more)
    result = python(*words, HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(cache))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def code(folder):
    return {file.name: file.read_text() for file in folder.glob("*.py")}


def test_fresh_processes(converted, tmp_path):
    """After the import alone; with trust_remote_code alone, which saves its code again; that without the package."""
    model, processor = build.load(converted), AutoProcessor.from_pretrained(converted)
    inputs = processor(images=Image.new("RGB", (70, 40), "red"), text="USER: <image> what", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
    classes = ["LlavaStfForConditionalGeneration", "LlavaStfModel", "LlavaStfProcessor"]

    one = load(converted, cache=tmp_path / "cache")
    assert one == {"classes": classes, "tokens": tokens}
    assert load(converted, str(tmp_path / "again"), cache=tmp_path / "cache", trust_remote_code=True) == one
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (converted, tmp_path / "again")]
    assert maps[0] == maps[1]
    for folder in (tmp_path / "again", tmp_path / "again-processor"):
        assert code(folder) == code(converted)
    processor_config = json.loads((tmp_path / "again-processor" / "processor_config.json").read_text())
    assert processor_config["auto_map"] == {"AutoProcessor": "llava_stf_auto.LlavaStfProcessor"}

    third, alone = tmp_path / "third", {"cache": tmp_path / "other", "trust_remote_code": True, "installed": False}
    assert load(converted, str(third), **alone) == one
    shutil.copytree(tmp_path / "third-processor", third, dirs_exist_ok=True)
    assert load(third, **alone) == one
    assert code(tmp_path / "third") == code(converted)


def test_without_auto_map_there_is_no_code(official, dst):
    convert_official(official, dst)
    assert not list((dst).glob("*.py"))
    assert "auto_map" not in (dst / "config.json").read_text()
    assert "trust_remote_code" not in (dst / "README.md").read_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_in_bytes_on_a_terminal_only(official, dst, monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    convert_official(official, dst)
    size = (dst / "model.safetensors").stat().st_size
    shown = re.findall(r"100%.*?([\d.]+)([kM])/", stream.getvalue())
    assert bool(shown) == terminal
    for value, unit in shown:
        assert float(value) * {"k": 1e3, "M": 1e6}[unit] == pytest.approx(size, rel=0.1)


class TestProcessor:
    def test_padding_keeps_the_whole_picture(self, official, converted):
        """A wide white image: mean-coloured bars above and below, which a centre crop would not have. The size is the
        tower's where there is no preprocessor_config.json."""
        assert not (official / "preprocessor_config.json").exists()
        images = AutoProcessor.from_pretrained(converted).image_processor
        assert (images.size["shortest_edge"], images.crop_size["height"]) == (build.PIXELS, build.PIXELS)
        pixels = images(Image.new("RGB", (112, 28), "white"), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, build.PIXELS, build.PIXELS)
        assert pixels[0, :, 0].abs().max() < 0.02, "the mean is zero after normalization"
        assert pixels[0, :, build.PIXELS // 2].min() > 1.5

    @pytest.mark.parametrize(("ratio", "pad"), [("pad", True), ("square", False)])
    def test_settings_of_preprocessor_config_are_kept(self, tmp_path, dst, ratio, pad):
        src = ck.make_official(tmp_path, image_aspect_ratio=ratio)
        settings = {"image_processor_type": "CLIPImageProcessor", "size": build.PIXELS, "crop_size": build.PIXELS}
        ck.write_json(src / "preprocessor_config.json", settings | {"image_mean": [0.1, 0.2, 0.3]})
        convert_official(src, dst)
        images = AutoProcessor.from_pretrained(dst).image_processor
        assert (list(images.image_mean), images.do_pad) == ([0.1, 0.2, 0.3], pad)

    def test_without_tokenizer_files(self, tmp_path, dst):
        src = ck.make_official(tmp_path, tokenizer=False)
        report = convert_official(src, dst)
        assert any("no tokenizer files" in warning for warning in report.warnings)
        assert not (dst / "processor_config.json").exists()
        model = AutoModelForImageTextToText.from_pretrained(dst)
        assert (model.config.image_token_index, model.config.text_config.vocab_size) == (ck.ROWS, 64)

    @pytest.mark.parametrize("side", [None, "right"])
    def test_a_batch_is_padded_on_the_left(self, tmp_path, dst, side):
        """What generation needs; padding on the right would be answered, and wrongly."""
        src = ck.make_official(tmp_path)
        if side:
            settings = json.loads((src / "tokenizer_config.json").read_text())
            ck.write_json(src / "tokenizer_config.json", settings | {"padding_side": side})
        convert_official(src, dst)
        processor = AutoProcessor.from_pretrained(dst)
        inputs = processor(text=["USER: what", "USER: what is in the picture"], padding=True, return_tensors="pt")
        assert inputs["attention_mask"].tolist() == [[0] * 4 + [1] * 2, [1] * 6]


class TestTemplate:
    """Vicuna v1, written out."""

    @pytest.fixture(scope="class")
    def render(self, converted):
        processor = AutoProcessor.from_pretrained(converted)
        return lambda messages, prompt=True: processor.apply_chat_template(messages, add_generation_prompt=prompt)

    def test_one_question_about_an_image(self, render):
        content = [{"type": "text", "text": "what is in the picture"}, {"type": "image"}]
        expected = f"{SYSTEM} USER: <image>\nwhat is in the picture ASSISTANT:"
        assert render([{"role": "user", "content": content}]) == expected

    def test_several_turns_and_a_system_message(self, render):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            {"role": "user", "content": "and"},
        ]
        assert render(messages) == "Be brief. USER: <image>\n<image>\nwhat ASSISTANT: a cat</s>USER: and ASSISTANT:"
        trained = [*messages, {"role": "assistant", "content": "a dog"}]
        assert render(trained, False).endswith("USER: and ASSISTANT: a dog</s>")


class TestCard:
    def test_official(self, converted):
        card = (converted / "README.md").read_text()
        assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
        parts = ["CC-BY-NC-4.0", "Vicuna", "patch_major", "channel-major", "23, 21, 18, 15, 12, 9, 6, 3", "2506.07138"]
        assert all(part in card for part in [*parts, "trust_remote_code=True", "\nprocessor = AutoProcessor.from_pre"])
        assert str(converted.parent) not in card, "no machine's paths"
        assert "added to the embeddings" not in card, "there was room"

    @pytest.mark.parametrize("window", [1, 2])
    def test_says_only_what_was_done(self, tmp_path, dst, window):
        """Without a tokenizer rows are added and there is no processor; a window of one token has one order."""
        src = ck.make_official(tmp_path, tokenizer=False)
        ck.write(src, ck.official_tensors(ck.make_tower(), ck.make_language(), ck.make_projector(window=window)), 2)
        convert_official(src, dst)
        card = (dst / "README.md").read_text()
        assert ("channel-major" in card) == (window == 2)
        assert "added to the embeddings" in card
        assert "AutoProcessor" not in card

    @pytest.mark.parametrize(
        ("theirs", "licence"),
        [
            ("---\nlicense: llama2\n---\n# A model\n", "llama2"),
            ("---\nlicense: [unclosed\n---\n", "other"),
            ("# A model\n", "other"),
            (None, "other"),
        ],
        ids=["declared", "damaged", "not declared", "no card"],
    )
    def test_llava_carries_the_declared_licence_over(self, stock, tmp_path, dst, theirs, licence):
        src = ck.linked(stock[0], tmp_path / "llava")
        if theirs is not None:
            (src / "README.md").write_text(theirs)
        convert_llava(src, dst)
        assert (dst / "README.md").read_text().startswith(f"---\nlicense: {licence}\n")

    def test_a_source_in_the_hubs_cache_has_its_name(self, stock, tmp_path, dst):
        src = ck.linked(stock[0], tmp_path / "models--an--llava-1.5" / "snapshots" / "0a1b")
        convert_llava(src, dst)
        assert "# LLaVA-STF from an/llava-1.5 at 0a1b\n" in (dst / "README.md").read_text()


@pytest.mark.parametrize("sampled", [True, False])
def test_settings_of_generation(tmp_path, sampled):
    """Of the first file, over the configuration's ids; without what transformers refuses beside greedy search."""
    theirs = {"do_sample": sampled, "max_length": 9, "eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9}
    ck.write_json(tmp_path / "generation_config.json", theirs)
    expected = theirs | {"bos_token_id": 1, "pad_token_id": 3}
    for name in () if sampled else ("temperature", "top_p"):
        del expected[name]
    text = LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    assert generation_settings([tmp_path / "adapter", tmp_path], text) == expected


def test_no_machine_path_anywhere(official, converted):
    for file in converted.iterdir():
        if file.suffix in (".json", ".md", ".py", ".jinja"):
            assert str(official.parent) not in file.read_text(), file.name


def test_files_are_readable_by_others_as_usual(converted):
    """Not the 0700 and 0600 of temporary folders and files."""
    probe = converted.parent / "probe"
    probe.mkdir()
    assert converted.stat().st_mode == probe.stat().st_mode
    probe.rmdir()
    assert {file.stat().st_mode for file in converted.iterdir()} == {(converted / "config.json").stat().st_mode}
