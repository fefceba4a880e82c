"""If these fail, a converted checkpoint reads other blocks of the tower than the ones its weights were trained on."""

import pytest

from llava_integration.convert.errors import ConversionError
from llava_integration.convert.geometry import Geometry, block_layers, published_blocks


def geometry(blocks: int) -> Geometry:
    return Geometry(blocks, 8, 2, 16, None if blocks == 1 else 32, 128, True)


def test_the_published_model():
    assert published_blocks(24) == [23, 21, 18, 15, 12, 9, 6, 3]
    assert block_layers(geometry(8), 24, -2, None) == [23, 21, 18, 15, 12, 9, 6, 3]


@pytest.mark.parametrize(("layers", "blocks"), [(12, [11, 9, 6, 3]), (6, [5, 3]), (8, [7, 6, 3])])
def test_the_same_rule_on_a_shallower_tower(layers, blocks):
    assert block_layers(geometry(len(blocks)), layers, -2, None) == blocks


@pytest.mark.parametrize(("layers", "count", "selected"), [(24, 7, -2), (24, 8, -3), (6, 3, -2)])
def test_what_the_rule_does_not_give_must_be_named(layers, count, selected):
    with pytest.raises(ConversionError, match=f"--blocks.*{count} blocks of a tower of {layers}"):
        block_layers(geometry(count), layers, selected, None)


def test_what_is_named_wins():
    assert block_layers(geometry(2), 6, -2, [4, 1]) == [4, 1]
    assert block_layers(geometry(2), 6, [4, 2], None) == [4, 2]
