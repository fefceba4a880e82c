"""If these fail, the offline search tries what cannot run, or leaves out what is worth trying."""

import pytest

from stf_kernels.configs import SHARED_MEMORY_LIMIT
from stf_kernels.tune.candidates import candidates
from stf_kernels.tune.problems import PROBLEMS


def found(name: str, m: int, itemsize: int = 2, arch: str = "sm_90"):
    return candidates(PROBLEMS[name], m, itemsize, arch, 132)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", ["gfx942", "sm_89", "sm_90"])
def test_candidates_fit_shared_memory_and_registers(itemsize, arch):
    configs = found("concat", 576, itemsize, arch)
    assert len(configs) == len(set(configs)) > 20
    for config in configs:
        assert config.shared_bytes(itemsize) <= SHARED_MEMORY_LIMIT[arch]
        assert config.rows * config.block_n / (32 * config.num_warps) <= 128


def test_few_rows_put_split_k_first_and_many_rows_do_not():
    few, many = (found("linear_merge", m, arch="sm_80")[0] for m in (144, 36_864))
    assert few.split_k > 1
    assert many.split_k == 1
    assert many.block_m * many.block_n >= 128 * 128


def test_a_search_cut_short_has_tried_every_promising_tile():
    shapes = [(c.form, c.block_m, c.block_n, c.tail_m, c.split_k) for c in found("concat", 576)]
    distinct = len(set(shapes))
    assert len(set(shapes[:distinct])) == distinct


@pytest.mark.parametrize(
    ("name", "arch", "itemsize", "forms"),
    [
        ("linear", "sm_90", 2, {"pointer", "tma", "swap_ab"}),
        ("concat", "sm_90", 2, {"pointer", "tma"}),
        ("merge", "sm_90", 2, {"pointer"}),
        ("concat_wgrad", "sm_90", 2, {"pointer"}),
        ("linear", "sm_100", 2, {"pointer", "tma", "swap_ab"}),
        ("linear", "sm_80", 2, {"pointer"}),
        ("linear", "sm_120", 2, {"pointer"}),
        ("linear", "gfx942", 2, {"pointer"}),
        ("linear", "sm_90", 4, {"pointer"}),
    ],
)
def test_forms_are_tried_where_they_run(name, arch, itemsize, forms):
    configs = found(name, 144, itemsize, arch)
    assert {config.form for config in configs} == forms
    assert any(config.split_k > 1 for config in configs) == ("wgrad" not in name and arch != "gfx942")


def test_one_image_puts_the_swapped_form_first():
    """144 rows are 128 + 16 there, and two tiles of 128 elsewhere."""
    configs = found("linear", 144)
    assert (configs[0].form, configs[0].rows) == ("swap_ab", 144)
    assert {config.form for config in configs[:24]} >= {"swap_ab", "tma"}
