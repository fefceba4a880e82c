"""The sizes that are measured, and the memory they need, as plain numbers (no torch: read before it is imported).

cpu   the real vision tower and projector, and two layers of a language model of 7B width: every ratio is a real one
7b    LLaVA-1.5-7B          13b   LLaVA-1.5-13B          tiny   a toy for tests; its times mean nothing
"""

from __future__ import annotations

from dataclasses import dataclass

# LLaVA-STF's blocks for a tower of 24 layers, deepest first (DESIGN, section 2).
BLOCKS = (23, 21, 18, 15, 12, 9, 6, 3)


@dataclass(frozen=True)
class Preset:
    name: str
    dim: int  # language model
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32064
    vision_dim: int = 1024
    vision_intermediate: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    batches: tuple[int, ...] = (1,)
    text_tokens: int = 64
    image_token: int | None = None  # of a checkpoint; a random model takes one of the last ids
    kv_heads: int | None = None  # fewer than heads: grouped queries
    head_dim: int | None = None  # where it is not dim / heads

    @property
    def image_token_id(self) -> int:
        return self.vocabulary - 8 if self.image_token is None else self.image_token

    @property
    def query_dim(self) -> int:
        """Width of all queries of a token, and of what attention returns."""
        return self.heads * self.head_dim if self.head_dim else self.dim

    @property
    def kv_dim(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.query_dim * (self.kv_heads or self.heads) // self.heads

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def image_tokens(self, merge_size: int) -> int:
        return (self.grid // merge_size) ** 2

    @property
    def vision_parameters(self) -> int:
        layer = 4 * self.vision_dim**2 + 2 * self.vision_dim * self.vision_intermediate
        return self.vision_layers * layer + (self.grid**2 + 1 + 3 * self.patch_size**2) * self.vision_dim

    @property
    def language_parameters(self) -> int:
        layer = 2 * self.dim * (self.query_dim + self.kv_dim) + 3 * self.dim * self.intermediate
        return self.layers * layer + 2 * self.vocabulary * self.dim

    @property
    def projector_parameters(self) -> dict[str, int]:
        """mlp2x: the stock projector. stf: with the hidden width the exact warm start needs (DESIGN, section 5)."""
        c, d = self.vision_dim, self.dim
        hidden = 4 * d
        return {"mlp2x": c * d + d * d, "stf": len(BLOCKS) * c * 4 * c + 4 * c * c + 4 * c * hidden + hidden * d}

    def kv_bytes(self, tokens: int, batch: int, item: int) -> int:
        return 2 * self.layers * tokens * self.kv_dim * batch * item

    def memory_bytes(self, batch: int, text_tokens: int, item: int, images: int = 1) -> int:
        """What a run of all rows holds at its peak: weights once (rows share them), a cache, the widest activations.

        Activations: the stock model keeps every hidden state of its tower; a few [tokens, widest] buffers live at once.
        """
        weights = self.vision_parameters + self.language_parameters + sum(self.projector_parameters.values())
        return item * weights + self.activation_bytes(batch, text_tokens, item, images)

    def activation_bytes(self, batch: int, text_tokens: int, item: int, images: int = 1) -> int:
        """What a prompt adds to the weights."""
        tokens = images * self.image_tokens(1) + text_tokens
        widest = max(3 * self.intermediate, 16 * self.vision_dim, self.vision_layers * self.vision_dim)
        return self.kv_bytes(tokens, batch, item) + 2 * item * batch * tokens * widest


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("cpu", dim=4096, intermediate=11008, layers=2, heads=32, text_tokens=40),
        Preset("7b", dim=4096, intermediate=11008, layers=32, heads=32, batches=(1, 8)),
        Preset("13b", dim=5120, intermediate=13824, layers=40, heads=40, batches=(1, 8)),
        Preset(
            "tiny", dim=64, intermediate=96, layers=2, heads=4, vocabulary=512, vision_dim=32, vision_intermediate=64,
            vision_heads=4, image_size=56, text_tokens=8,
        ),
    )
}  # fmt: skip
