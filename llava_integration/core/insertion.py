"""Where the image tokens of a prompt are, and whether there are as many as the images need.

rows[i] = position of the i-th image token in the flattened [B*S] ids,   i < images * image_seq_length
"""

import torch
from torch import Tensor
from transformers.utils import torch_compilable_check


def is_captured() -> bool:
    """True where reading a tensor's value is impossible: torch.compile, export, CUDA graph capture."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def image_rows(mask: Tensor, count: int) -> Tensor:
    """The first `count` True positions of mask [B, S], row-major -> [count] int64, with no host-device synchronisation.

    A stable descending sort has a fixed size where nonzero does not. With fewer than `count` True positions, False
    ones follow.
    """
    return mask.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:count]


def check_token_count(mask: Tensor, images: float, tokens_per_image: int, image_token_id: int) -> None:
    """ValueError unless mask [B, S] marks exactly images * tokens_per_image positions. Not checked under capture.

    `images`: a whole number, except for a chunk of a prompt, which may end within an image.
    """
    if is_captured():
        return
    needed, found = round(images * tokens_per_image), mask.sum()

    def message() -> str:
        return (
            f"Image features and image tokens do not match, tokens: {int(found)}, features: {needed}. input_ids: found "
            f"{int(found)} image tokens (id {image_token_id}; {mask.sum(-1).tolist()} in the rows), but {needed} are "
            f"needed for {images:g} image(s) or frame(s), {tokens_per_image} each; prepare prompts with the "
            "processor of this model, not with that of the stock LLaVA"
        )

    torch_compilable_check(found == needed, message)
