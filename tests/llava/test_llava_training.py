"""Broken if this fails: LLaVA-STF cannot be fine-tuned as the paper does it, or adapters of it do not come back."""

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


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("start", ["random", "warm"])
def test_the_projector_learns_with_all_else_frozen(batch, start, checkpointing):
    """The paper's first stage: every projector weight moves, nothing else does, the loss falls."""
    model = build.stf(torch.float32) if start == "random" else li.from_llava(build.stock(torch.float32))
    model.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = snapshot(model)
    losses = train(model, batch)
    assert losses[-1] < 0.95 * losses[0], losses
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("model.multi_modal_projector."), name


def test_a_trainer_resumes_where_it_was(batch, tmp_path):
    """Steps 3 and 4 after a restart are those of the run that went through, weights and optimiser."""
    pytest.importorskip("accelerate")

    def run(**options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(build.stf(torch.float32), arguments, lambda _: batch, train_dataset=list(range(32)))
        trainer.train(**options)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run()
    assert whole[3] < whole[2] < whole[0]
    assert run(resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == whole


def test_checkpointing_recomputes_tower_and_language_model(batch):
    model, calls = build.stf(torch.float32).train(), {"tower": 0, "text": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    model.model.vision_tower.encoder.layers[0].layer_norm1.register_forward_hook(count("tower"))
    model.model.language_model.layers[0].input_layernorm.register_forward_hook(count("text"))
    model(**batch).loss.backward()
    assert calls == {"tower": 3, "text": 1}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    assert calls == {"tower": 9, "text": 3}


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


def test_adapters_through_transformers(batch, tmp_path):
    """An adapter folder given to from_pretrained of the Auto class."""
    peft = pytest.importorskip("peft")
    build.stf(torch.float32).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    model.add_adapter(config)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        plain = loaded(**batch).logits
        loaded.load_adapter(tmp_path / "adapter")
        assert torch.allclose(loaded.eval()(**batch).logits, expected, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-3)
