"""Broken if this fails: LLaVA-STF cannot be fine-tuned as the paper does it, or adapters of it do not come back."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import llava_integration as li
from tests.llava import build


@pytest.fixture
def batch():
    ids, mask = build.prompt([1, 2])
    labels = ids.masked_fill((ids == build.IMAGE_TOKEN) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": build.pixels(3, torch.float32), "labels": labels}


def train(model, batch, steps=12, rate=3e-3):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=rate), []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("start", ["random", "warm"])
def test_the_projector_learns_with_all_else_frozen(batch, start):
    """The paper's first stage: every projector weight moves, nothing else does, the loss falls."""
    model = build.stf(torch.float32) if start == "random" else li.from_llava(build.stock(torch.float32))
    model.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    losses = train(model, batch)
    assert losses[-1] < 0.95 * losses[0], losses
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("model.multi_modal_projector."), name


def test_a_trainer_resumes_where_it_was(batch, tmp_path):
    """Steps 3 and 4 after a restart are those of the run that went through, weights and optimiser."""
    pytest.importorskip("accelerate")

    def run(**options):
        steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(output_dir=str(tmp_path), **steps, **quiet)
        trainer = Trainer(build.stf(torch.float32), arguments, lambda _: batch, train_dataset=list(range(32)))
        trainer.train(**options)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run()
    assert whole[3] < whole[2] < whole[0]
    assert run(resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == whole


def test_checkpointing_recomputes_tower_and_language_model(batch):
    """The same gradients from fewer activations."""
    model, ran = build.stf(torch.float32).train(), []
    tower, text = model.model.vision_tower.encoder.layers[0], model.model.language_model.layers[0]
    tower.layer_norm1.register_forward_hook(lambda *_: ran.append("tower"))
    text.input_layernorm.register_forward_hook(lambda *_: ran.append("text"))

    def step():
        ran.clear()
        model.zero_grad()
        model(**batch).loss.backward()
        return model.model.multi_modal_projector.mbtf.linear_1.weight.grad.clone()

    expected = step()
    assert sorted(ran) == ["text", "tower", "tower", "tower"]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(step(), expected, rtol=1e-4, atol=1e-7)
    assert sorted(ran) == ["text"] * 2 + ["tower"] * 6


def test_adapters_on_the_language_model_learn_and_come_back(batch, tmp_path):
    """LoRA with the projector trained in full, as LLaVA is tuned; saved by PEFT, loaded by PEFT and by transformers."""
    peft = pytest.importorskip("peft")
    build.stf(torch.float32).save_pretrained(tmp_path / "base")
    targets = r".*language_model.*(q_proj|v_proj)"
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["multi_modal_projector"])
    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), config).train()
    losses = train(model, batch)
    assert losses[-1] < 0.9 * losses[0], losses
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        assert not torch.allclose(base(**batch).logits, expected, atol=1e-2)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.allclose(loaded(**batch).logits, expected, atol=1e-6)
        assert torch.allclose(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-5)
