"""If this fails, TRL and PEFT do not train an LLaVA-STF folder, or what they trained is not what is served."""

import json
import re
import subprocess
import warnings

import pytest
import torch
from peft import PeftModel
from support.clients import IN_FOLDER, QUESTION, ask, make_folder, readme
from support.processes import ROOT, clean_environment, patient, python
from tiny_llava import make_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.vllm_server import SETTINGS
from llava_integration import clients
from tests.llava import build

QUICK = ["--use_cpu", "--bf16", "false", "--learning_rate", "0.01", "--logging_steps", "1", "--report_to", "none"]
QUICK += ["--save_strategy", "no", "--disable_tqdm", "true"]


@pytest.fixture
def data(tmp_path):
    """Twelve pictures in LLaVA's format, two turns in the last."""
    records = []
    for i in range(12):
        make_image().rotate(30 * i).resize((60 + i, 80)).save(tmp_path / f"{i}.png")
        turns = [("human", "<image>\nWhat is this?"), ("gpt", "A rocket.")]
        turns += [("human", "What A?"), ("gpt", "rocket.")] if i == 11 else []
        conversations = [{"from": role, "value": value} for role, value in turns]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": conversations})
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps(records))
    return file


SCRIPT = "examples/trl_lora.py"


def train(folder, data, out, *options, command=(SCRIPT,), **environment):
    arguments = ["--model", str(folder), "--data", str(data), "--images", str(data.parent), "--output_dir", str(out)]
    return python(*command, *arguments, *QUICK, *options, timeout=300, **environment)


def losses(result):
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.e-]+)", result.stdout)]


def test_it_trains_reloads_merges_and_answers(folder, data, tmp_path):
    found = losses(train(folder, data, tmp_path / "out", "--max_steps", "12", "--per_device_train_batch_size", "4"))
    assert len(found) == 12
    assert found[-1] < 0.8 * found[0]
    adapter, merged = tmp_path / "out" / "adapter", tmp_path / "out" / "merged"
    base = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = AutoProcessor.from_pretrained(merged)(make_image(), text=QUESTION + "<image>", return_tensors="pt")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = AutoModelForImageTextToText.from_pretrained(merged)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all("multi_modal_projector" in name or "_proj.weight" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, adapter).eval()(**inputs).logits
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)


VLLM = ROOT / ".venv-vllm" / "bin" / "python"
SERVED = """
import sys
from PIL import Image
from vllm import LLM, SamplingParams

folder, prompt = sys.argv[1:]
small = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 256, "limit_mm_per_prompt": {"image": 1}}
llm = LLM(folder, dtype="float32", enforce_eager=True, **small)
asked = {"prompt": prompt, "multi_modal_data": {"image": Image.open(f"{folder}/asked.png")}}
print(list(llm.generate(asked, SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids))
"""


def test_vllm_serves_what_was_trained(folder, data, tmp_path):
    """The greedy tokens of `generate`; skipped where `make test-vllm` has made no environment."""
    if not VLLM.exists():
        pytest.skip(f"{VLLM.parent.parent} is not there (make test-vllm): generate, tested above, is what answers")
    build.randomize(build.stf(torch.float32, **build.wide())).save_pretrained(folder)  # heads that vLLM takes on a CPU
    losses(train(folder, data, tmp_path / "out", "--max_steps", "4", "--per_device_train_batch_size", "4"))
    merged = tmp_path / "out" / "merged"
    make_image().save(merged / "asked.png")
    environment = clean_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", **SETTINGS)
    command = [str(VLLM), "-c", SERVED, str(merged), "USER: <image> What is this? ASSISTANT:"]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=patient(300)
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == ask(merged, 4)[1]


def test_two_processes_give_the_losses_of_one(folder, data, tmp_path):
    """Half of the batch each, over gloo, by accelerate inside the trainer."""
    steps = ["--max_steps", "3", "--per_device_train_batch_size"]
    one = losses(train(folder, data, tmp_path / "one", *steps, "4"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
    two = losses(train(folder, data, tmp_path / "two", *steps, "2", "--ddp_backend", "gloo", command=launcher))
    assert one == pytest.approx(two, rel=1e-3)
    weights = [AutoModelForImageTextToText.from_pretrained(tmp_path / name / "merged") for name in ("one", "two")]
    for (name, a), b in zip(weights[0].state_dict().items(), weights[1].state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-3), name


BEFORE = """
import functools
import trl
from datasets import Dataset
on_a_cpu = trl.SFTConfig(use_cpu=True, bf16=False, report_to="none")
trl.SFTTrainer = functools.partial(trl.SFTTrainer, args=on_a_cpu)
turns = {"prompt": [{"role": "user", "content": "What is this?"}]}
turns |= {"completion": [{"role": "assistant", "content": "A rocket."}]}
dataset = Dataset.from_list([{"images": [image]} | turns] * 2)
"""


def test_the_three_lines_of_the_readme(folder):
    code = f"{IN_FOLDER.format(str(folder.parent))}{BEFORE}{readme('TRL')[0]}"
    result = python("-c", code, PYTHONPATH=f"{ROOT}:{ROOT}/examples", timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "train_loss" in result.stdout


def test_what_cannot_be_trained_is_named_in_one_sentence(folder, data, tmp_path):
    """Before TRL loads anything: another kind of model, no processor, another TRL."""
    result = train(make_folder(tmp_path / "stock", stock=True), data, tmp_path / "out")
    assert result.stderr.splitlines()[-1].startswith(f"ValueError: {tmp_path}/stock: expected a LLaVA-STF model")
    (folder / "processor_config.json").unlink()
    result = train(folder, data, tmp_path / "out")
    assert "found no processor_config.json" in result.stderr.splitlines()[-1]
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected a LLaVA-STF model, got no config\.json"):
        clients.check_folder(folder)
    with warnings.catch_warnings(action="error"):
        clients.check_version("trl")
