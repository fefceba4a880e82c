"""If these fail, the offline search tries what cannot run, or leaves out what is worth trying."""

import pytest

from stf_kernels.tune.problems import PROBLEMS
from stf_kernels.tune.candidates import candidates, forms_for

CONCAT = PROBLEMS["concat"]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("limit", [65_536, 101_376, 232_448])
def test_candidates_fit_shared_memory_and_registers(itemsize, limit):
    found = candidates(576, 4096, 8192, itemsize, shared_limit=limit, multiprocessors=132)
    assert len(found) == len(set(found)) > 20
    for config in found:
        assert config.shared_bytes(itemsize) <= limit
        assert config.block_m * config.block_n / (32 * config.num_warps) <= 128


def test_few_rows_put_split_k_first_and_many_rows_do_not():
    few, many = (candidates(m, 1024, 4096, 2, shared_limit=232_448, multiprocessors=132)[0] for m in (144, 36_864))
    assert few.split_k > 1
    assert many.split_k == 1
    assert many.block_m * many.block_n >= 128 * 128


def test_a_search_cut_short_has_tried_every_promising_tile():
    found = candidates(576, 4096, 8192, 2, shared_limit=232_448, multiprocessors=132)
    shapes = [(c.block_m, c.block_n, c.split_k) for c in found]
    distinct = len(set(shapes))
    assert len(set(shapes[:distinct])) == distinct


HOPPER = {"shared_limit": 232_448, "multiprocessors": 132}


def test_forms_are_tried_where_they_run():
    linear, merge = PROBLEMS["linear"], PROBLEMS["merge"]
    assert set(forms_for(linear, "sm_90", 2)) == {"pointers", "descriptors", "swapped"}
    assert set(forms_for(CONCAT, "sm_90", 2)) == {"pointers", "descriptors"}
    for problem, arch, itemsize in ((merge, "sm_90", 2), (linear, "sm_80", 2), (linear, "sm_90", 4)):
        assert forms_for(problem, arch, itemsize) == ("pointers",)


def test_one_image_puts_the_swapped_form_first():
    """144 rows are 128 + 16 there, and two tiles of 128 elsewhere."""
    found = candidates(144, 16384, 4096, 2, forms=forms_for(PROBLEMS["linear"], "sm_90", 2), **HOPPER)
    assert (found[0].form, found[0].rows) == ("swapped", 144)
    assert {config.form for config in found[:24]} >= {"swapped", "descriptors"}


def test_many_rows_put_descriptors_first():
    found = candidates(18432, 4096, 8192, 2, forms=forms_for(CONCAT, "sm_90", 2), **HOPPER)
    assert found[0].form == "descriptors"
    assert {config.form for config in found[:24]} == {"descriptors", "pointers"}
