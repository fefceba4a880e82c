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
    """The first `count` True positions of mask [B, S], row-major, then False ones -> [count] int64.

    A stable descending sort has a fixed size where nonzero does not: nothing waits for the device.
    """
    return mask.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:count]


def check_token_count(mask: Tensor, needed: int, image_token_id: int) -> None:
    """ValueError unless mask [B, S] marks as many positions as the images have tokens. Not checked under capture."""
    if is_captured():
        return
    found = mask.sum()

    def message() -> str:
        begin = f"Image features and image tokens do not match, tokens: {int(found)}, features: {needed}"
        counted = f"found {int(found)} image tokens (id {image_token_id}; {mask.sum(-1).tolist()} in the rows)"
        return f"{begin}. input_ids: {counted}, but {needed} are needed; prepare prompts with this model's processor"

    torch_compilable_check(found == needed, message)


def images_in_parts(tokens: list[int], counts: list[int]) -> list[int]:
    """How many of the images that have counts[i] tokens stand in each part of a prompt that has tokens[j] of them.

    In order; what is left over in a part are tokens that sampling has made, fewer than an image has.
    """
    found, image = [], 0
    for room in tokens:
        first = image
        while image < len(counts) and counts[image] <= room:
            room -= counts[image]
            image += 1
        found.append(image - first)
    return found
