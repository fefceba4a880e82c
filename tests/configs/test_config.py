"""If these fail, a configuration that no kernel takes passes for one, or the model's own do not fit a GPU."""

from dataclasses import replace

import pytest

from stf_kernels.aot.cases import PROBLEMS
from stf_kernels.configs import SHARED_MEMORY_LIMIT, GemmConfig, default_config
from stf_kernels.configs.model import ARCHITECTURES, cycles, every_tile, others, tiles, waves

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
        ({"form": "swap_ab"}, r"tail_m.*\[16, 32, 64, 128\].*got 0"),
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
def test_the_models_tiles_fit_every_architecture(arch, itemsize):
    limit = SHARED_MEMORY_LIMIT.get(arch, 65_536 if arch.startswith("gfx") else 101_376)
    assert tiles(arch, itemsize, save_pre=True) == tiles(arch, itemsize)[1:]
    for config in (*tiles(arch, itemsize), *others(arch, itemsize)):
        assert config.shared_bytes(itemsize) <= limit, config
        assert config.portable().shared_bytes(itemsize) <= config.shared_bytes(itemsize)
        assert config.portable() == config.portable().portable()
        assert config.portable().form == "pointer"
        assert config.form == "pointer" or (itemsize == 2 and arch in ("sm_90", "sm_100", "sm_103"))
        assert config.split_k == 1 or arch.startswith("sm_"), "AMD's barrier does not publish a part of a split K"


@pytest.mark.parametrize(
    ("arch", "itemsize", "config", "size", "price"),
    [
        ("sm_80", 2, GemmConfig(64, 128, 32, 8, 4, 4), (144, 4096, 4096), 61_554),
        ("sm_80", 2, GemmConfig(128, 256, 32, 8, 8, 4), (144, 4096, 4096), 158_148),
        ("sm_89", 2, GemmConfig(128, 64, 64, 8, 4, 3, 2), (144, 4096, 4096), 171_402),
        ("sm_90", 2, GemmConfig(128, 128, 64, 8, 8, 3, 2), (576, 2048, 8192), 117_581),
        ("sm_100", 2, GemmConfig(64, 256, 64, 8, 8, 4, 2), (144, 4096, 4096), 34_964),
        ("sm_120", 2, GemmConfig(128, 64, 64, 8, 4, 3, 2), (144, 4096, 4096), 164_999),
        ("gfx942", 2, GemmConfig(64, 128, 64, 8, 4, 2), (9216, 2048, 8192), 690_628),
        ("gfx942", 4, GemmConfig(32, 64, 16, 8, 4, 2), (36864, 4096, 1024), 4_207_761),
    ],
)
def test_prices_change_on_purpose_alone(arch, itemsize, config, size, price):
    """The model's own numbers: with them changes what serves where nothing was measured."""
    assert round(cycles(config, *size, itemsize, arch, ARCHITECTURES[arch].multiprocessors)) == price


def test_work_a_tenth_above_the_least_is_taken_where_it_is_cheaper():
    assert default_config("sm_90", 2, 3168, 4096, 4096) == GemmConfig(128, 128, 64, 8, 8, 3)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_a_search_with_time_tries(itemsize):
    """All of it is taken by a form, and holds 4 to 128 elements of its tile a thread."""
    found = list(every_tile("sm_90", itemsize))
    assert len(set(found)) == len(found)
    assert {config.block_k for config in found} == ({32, 64, 128} if itemsize == 2 else {16, 32})
    for config in found:
        assert config.group_m == 8
        assert 4 <= config.rows * config.block_n / (32 * config.num_warps) <= 128


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_serves_when_no_table_matches(arch, itemsize):
    """Of kernels that any GPU takes: one wave, or work of the busiest multiprocessor within 10% of the least, of every
    product of the projector; but for few images on sm_90 and sm_100, where that would take a fifth more time or more.
    And never much dearer than the cheapest; many rows cost more than few."""
    count, dearer = ARCHITECTURES[arch].multiprocessors, set()
    for problem in PROBLEMS.values():
        menu, before = tiles(arch, itemsize, save_pre=problem.save_pre), 0.0
        assert {(config.form, config.split_k, config.pdl) for config in menu} == {("pointer", 1, False)}
        for batch in (1, 2, 4, 8, 16, 32, 64):
            m, n, k = batch * problem.tokens, problem.n, problem.k
            costs = {config: cycles(config, m, n, k, itemsize, arch, count) for config in menu}
            work = {config: waves(config, m, n, count)[1] for config in menu}
            found = default_config(arch, itemsize, m, n, k, save_pre=problem.save_pre)
            assert costs[found] <= 1.15 * min(costs.values())
            assert min(costs.values()) >= before
            before = min(costs.values())
            if waves(found, m, n, count)[0] > 1 and work[found] > 1.1 * min(work.values()):
                dearer.add(batch)
                assert min(c for config, c in costs.items() if work[config] <= 1.1 * min(work.values())) > 1.2 * before
    assert dearer <= ({1, 2, 4, 8, 16} if itemsize == 2 and arch in ("sm_90", "sm_100") else set())
