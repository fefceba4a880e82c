"""Fine-tune the projector alone: tower and language model stay frozen, every layer of the projector learns.

Runs on a CPU in seconds with a tiny random model: python examples/train_projector.py
"""

import torch
from tiny_llava import make_image, make_model, make_processor

from llava_integration import LlavaStfProcessor, from_llava

model = from_llava(make_model())
processor = LlavaStfProcessor.from_llava(make_processor())
inputs = processor(images=make_image(), text="USER: <image> What is this? ASSISTANT: A rocket.", return_tensors="pt")
labels = inputs.input_ids.clone()
labels[:, :-2] = -100  # learn the answer, not the question

projector = model.model.multi_modal_projector
model.requires_grad_(False)
projector.requires_grad_(True)
optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)

losses = []
for step in range(20):
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 5 == 0:
        print(f"step {step:2d}  loss {losses[-1]:.3f}")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
