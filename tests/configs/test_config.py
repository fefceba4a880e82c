"""If these fail, a configuration that no kernel takes passes for one, or the model's own do not fit a GPU."""

from dataclasses import replace

import pytest

from stf_kernels.configs import SHARED_MEMORY_LIMIT, GemmConfig, default_config, smallest
from stf_kernels.configs.model import split_tiles, swap_ab_tiles, tiles, tma_tiles

CONFIG = GemmConfig(128, 256, 64, 8, 8, 3)


@pytest.mark.parametrize("field", ["block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages", "split_k"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_number_that_is_no_positive_int(field, value):
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_m": 24}, "block_m.*power of two.*24"),
        ({"block_m": 192}, "block_m.*power of two.*192"),
        ({"block_n": 8}, "block_n.*16.*8"),
        ({"num_warps": 3}, "num_warps.*3"),
        ({"pdl": 1}, "pdl.*true or false.*1"),
        ({"form": "descriptors"}, "form.*tma.*descriptors"),
        ({"form": "tma", "block_m": 32}, "block_m of 64"),
        ({"form": "tma", "split_k": 2}, "does not split K"),
        ({"form": "swap_ab"}, "tail_m.*16.*got 0"),
        ({"form": "swap_ab", "block_m": 64, "tail_m": 128}, "tail_m.*64.*got 128"),
        ({"tail_m": 16}, r"tail_m.*\[0\] for pointer.*16"),
        ({"warps": 4}, "unknown field 'warps'"),
        ({"block_k": None}, "block_k.*missing"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(changes, match):
    values = {**CONFIG.to_dict(), **changes}
    with pytest.raises(ValueError, match=match):
        GemmConfig.from_dict({name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize("arch", [*SHARED_MEMORY_LIMIT, "sm_75", "gfx1100"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_model_fits_every_architecture(arch, itemsize):
    limit = SHARED_MEMORY_LIMIT.get(arch, 65_536 if arch.startswith("gfx") else 101_376)
    for config in (*tiles(arch, itemsize), *split_tiles(arch, itemsize), smallest(itemsize)):
        assert config.shared_bytes(itemsize) <= limit, config
    big, small = (default_config(arch, itemsize, m, 4096) for m in (18432, 16))
    assert big.block_m * big.block_n > small.block_m * small.block_n
    assert big.split_k == small.split_k == 1, "split-K has not run on hardware and is no default"
    assert big.form == small.form == "pointer", "nor have the forms with descriptors"


def test_forms_are_offered_where_they_run():
    for arch, has in (("sm_90", True), ("sm_100", True), ("sm_80", False), ("sm_120", False), ("gfx942", False)):
        assert bool(tma_tiles(arch, 2)) == bool(swap_ab_tiles(arch, 2)) == has
        assert not tma_tiles(arch, 4)
    assert split_tiles("gfx942", 2) == []
    assert all(config.split_k > 1 for config in split_tiles("sm_90", 2))


def test_every_form_fits_shared_memory_and_so_does_what_serves_in_its_place():
    for config in (*tma_tiles("sm_90", 2), *swap_ab_tiles("sm_90", 2)):
        assert config.portable().form == "pointer"
        assert config.portable().shared_bytes(2) <= config.shared_bytes(2) <= SHARED_MEMORY_LIMIT["sm_90"]
        assert config.portable() == config.portable().portable()
