"""Broken if this fails: a model of tiles is not the stock one with every tile's tokens averaged."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import llava_integration as li
from tests.llava import tiled

WINDOWS = [("next", 2, False), ("next", 3, True), ("next", 4, False), ("onevision", 3, False), ("onevision", 2, True)]


def close(ours, expected):
    assert [f.shape for f in ours] == [f.shape for f in expected]
    return all((a - b).abs().max() < 1e-12 * b.abs().max() for a, b in zip(ours, expected, strict=True))


def features(model, made):
    with torch.no_grad():
        return list(model.get_image_features(**made).pooler_output)


@pytest.mark.parametrize("family", tiled.MODELS)
def test_the_rules_written_here_are_those_of_the_stock_models(family):
    model = tiled.MODELS[family]()
    made = tiled.inputs(model, tiled.SIZES)
    assert close(features(model, made), tiled.expected(model, made, tiled.SIZES, 1))


@pytest.mark.parametrize(("family", "r", "truncate"), WINDOWS)
def test_features_are_the_packed_averages_of_the_stock_tokens(family, r, truncate):
    stock = tiled.MODELS[family]()
    stf = li.from_llava(stock, merge_size=r, truncate=truncate)
    made = tiled.inputs(stock, tiled.SIZES)
    assert close(features(stf, made), tiled.expected(stock, made, tiled.SIZES, r))


@pytest.mark.parametrize("family", tiled.MODELS)
def test_packing_makes_no_tensor_on_the_device_from_a_list(family):
    """That would wait for a GPU, and end the capture of a graph."""
    model, devices = li.from_llava(tiled.MODELS[family]()).model, []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.tensor:
                devices.append((kwargs or {}).get("device"))
            return function(*args, **(kwargs or {}))

    with Spy():
        model.image_token_counts(None, [(60, 100)])
    assert devices == [None]


@pytest.mark.parametrize("family", tiled.MODELS)
def test_counts(family):
    """For a set of drawn sizes and every window the processor counts what the model makes."""
    stock = tiled.MODELS[family]()
    for r, truncate in [(None, False), (2, True), (3, True)]:
        stf = li.from_llava(stock, merge_size=r, truncate=truncate)
        processor = tiled.stf_processor(stock, r)
        draw = torch.Generator().manual_seed(0)
        sizes = [tuple(size) for size in (torch.randint(2, 60, (80, 2), generator=draw) ** 1.6).long().tolist()]
        made = stf.model.image_token_counts(None, sizes)
        assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == made
