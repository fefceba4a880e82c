"""What LLaVA-STF saves beyond its projector, and LLaVA-STF without: `reference` and `fused` differ in operators alone.

tower      every layer runs, the unread last one too, as in the stock forward; all images in one piece
insertion  the projector returns its tokens; masked_scatter copies inputs_embeds with them in their places
           (in a captured prefill, where that would wait for the device: index_copy_, as for LLaVA-1.5)
"""

from torch import Tensor, nn

from llava_integration.core.tower import tower_hidden_states
from llava_integration.llava_stf import LlavaStfModel
from stf_kernels import CompactTokenProjector

# name in prefill.json -> what it is; the row fused+savings, LLaVA-STF as a user of the library gets it, has all of them
SAVINGS = {
    "unused-tower-layers": "tower layers that nobody reads do not run",
    "in-place-insertion": "the projector's last product writes its rows into inputs_embeds",
    "image-by-image": "the tower takes one image at a time where more would leave the caches of a CPU",
}


class PlainModel(LlavaStfModel):
    """LlavaStfModel with the whole tower and the plain insertion."""

    def encode_blocks(self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None) -> list[Tensor]:
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        return tower_hidden_states(self.vision_tower, pixel_values, layers, run_all=True)

    def project_images(self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None) -> Tensor:
        return self.multi_modal_projector(self.encode_blocks(pixel_values, vision_feature_layer), self.vision_grid)

    def _writes_in_place(self, inputs_embeds: Tensor) -> bool:
        return False


class PlainProjector(CompactTokenProjector):
    """The fused projector, its tokens in a tensor of their own before they go anywhere."""

    def forward(self, blocks, grid=None, *, out: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        tokens = super().forward(blocks, grid)
        return tokens if out is None else out.index_copy_(0, rows, tokens.flatten(0, 1))


def make_plain(model: nn.Module) -> None:
    """Take its savings from a LlavaStfForConditionalGeneration, in place."""
    model.model.__class__ = PlainModel
    model.model.multi_modal_projector.__class__ = PlainProjector


def savings_in(mode: str, device: str) -> list[str]:
    """Those that LLaVA-STF has in a mode: torch.compile takes the plain insertion and all images in one piece."""
    if mode == "compile":
        return ["unused-tower-layers"]
    return ["unused-tower-layers", "in-place-insertion"] + ["image-by-image"] * (not device.startswith("cuda"))
