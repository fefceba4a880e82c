"""If these fail, a converted checkpoint reads other blocks of the tower than the ones its weights were trained on."""

import pytest

from llava_integration.convert import ConversionError
from llava_integration.convert.official import block_layers


def test_the_published_model():
    assert block_layers(8, 24, -2, None) == [23, 21, 18, 15, 12, 9, 6, 3]


@pytest.mark.parametrize(("layers", "blocks"), [(12, [11, 9, 6, 3]), (6, [5, 3]), (8, [7, 6, 3])])
def test_the_same_rule_on_a_shallower_tower(layers, blocks):
    assert block_layers(len(blocks), layers, -2, None) == blocks


@pytest.mark.parametrize(("layers", "count", "selected"), [(24, 7, -2), (24, 8, -3), (6, 3, -2)])
def test_what_the_rule_does_not_give_must_be_named(layers, count, selected):
    with pytest.raises(ConversionError, match=f"--blocks.*{count} blocks of a tower of {layers}"):
        block_layers(count, layers, selected, None)


def test_what_is_named_wins():
    assert block_layers(2, 6, -2, [4, 1]) == [4, 1]
    assert block_layers(2, 6, [4, 2], None) == [4, 2]
