"""LLaVA-1.5 -> LLaVA-STF with a quarter of its image tokens -> saved -> loaded -> generates.

Runs on a CPU in seconds with a tiny random model: python examples/warm_start.py
"""

import tempfile

import torch
from tiny_llava import make_image, make_model, make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_integration import LlavaStfProcessor, from_llava

stock, stock_processor, image = make_model(), make_processor(), make_image()
prompt = "USER: <image> What is this? ASSISTANT:"

model = from_llava(stock)
processor = LlavaStfProcessor.from_llava(stock_processor)

# Before any training, an image token is the 2x2 average of the stock model's.
pixels = processor(images=image, text=prompt, return_tensors="pt").pixel_values
with torch.no_grad():
    tokens = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
    before = torch.stack(list(stock.model.get_image_features(pixels).pooler_output))
pooled = before.reshape(1, 2, 2, 2, 2, -1).mean(dim=(2, 4)).flatten(1, 2)
print(f"{before.shape[1]} image tokens -> {tokens.shape[1]}, off the average by {(tokens - pooled).abs().max():.1e}")
torch.testing.assert_close(tokens, pooled, atol=1e-5, rtol=1e-4)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # A process of its own needs `import llava_integration` before these two lines.
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

inputs = processor(images=image, text=prompt, return_tensors="pt")
options = {"max_new_tokens": 5, "do_sample": False}
answer = loaded.generate(**inputs, **options)
assert torch.equal(answer, model.generate(**inputs, **options))
print("generated ids after loading:", answer[0, inputs.input_ids.shape[1] :].tolist())
