"""Serve many prompts of one shape: PrefillRunner keeps its buffers and, on a GPU, replays one CUDA graph.

Runs on a CPU in seconds with a tiny random model, where the same code runs without a graph:
python examples/prefill_runner.py
"""

import torch
from tiny_llava import make_image, make_model, make_processor

from llava_integration import LlavaStfProcessor, PrefillRunner, from_llava

model = from_llava(make_model())
processor = LlavaStfProcessor.from_llava(make_processor())
inputs = processor(images=make_image(), text="USER: <image> What is this? ASSISTANT:", return_tensors="pt")

batch, length = inputs.input_ids.shape
runner = PrefillRunner(model, batch=batch, seq_len=length, max_new_tokens=4)
logits = runner(inputs.input_ids, inputs.pixel_values)  # [batch, vocabulary], of the last position

with torch.no_grad():
    expected = model(**inputs).logits[:, -1]
print(f"{length} tokens prefilled, off the ordinary forward by {(logits - expected).abs().max():.1e}")
torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

# `runner.cache` holds the keys and values of the prompt: decoding continues from it.
token = logits.argmax(-1, keepdim=True)
with torch.no_grad():
    step = model(input_ids=token, past_key_values=runner.cache, cache_position=torch.tensor([length]))
print("next two ids:", token.item(), step.logits[:, -1].argmax(-1).item())
