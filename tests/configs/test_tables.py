"""If these fail, a wrong or foreign table decides what runs on a user's GPU, or a good one is not used."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from stf_kernels import tuning
from stf_kernels.configs import GemmConfig, default_config, launches, lookup, smallest
from stf_kernels.configs.model import (
    SHARED_MEMORY_LIMIT,
    tma_tiles,
    split_tiles,
    swap_ab_tiles,
    tiles,
    wgrad_tiles,
)

CONFIG = GemmConfig(128, 256, 64, 8, 8, 3)
CUDA = torch.device("cuda", 0)


def entry(**changes) -> dict:
    return {
        "stage": "concat", "dtype": "bfloat16", "n": 4096, "k": 8192, "m_max": 1152, "provider": "triton",
        "config": CONFIG.to_dict(), "us": 70.0, "rival": "cublas", "rival_us": 80.0, **changes,
    }  # fmt: skip


def table(*entries: dict, **changes) -> str:
    top = {"version": 1, "device": "NVIDIA H200", "arch": "sm_90", "commit": "x", "torch": "2", "triton": "3"}
    return json.dumps({**top, "entries": list(entries), **changes})


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A GPU named "test-gpu" whose table is the file that is returned."""
    monkeypatch.setattr(lookup, "_TABLES", tmp_path)
    monkeypatch.setattr(lookup, "device_identity", lambda index: ("test-gpu", "sm_90"))
    monkeypatch.setattr(lookup, "_too_large", set())
    lookup._table.cache_clear()
    lookup._choose.cache_clear()
    launches._faster.cache_clear()
    for variable in launches.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    yield tmp_path / "test-gpu.json"
    lookup._table.cache_clear()
    lookup._choose.cache_clear()
    launches._faster.cache_clear()


def choose(m: int, n: int = 4096, k: int = 8192, **options) -> GemmConfig | None:
    return tuning.choose(CUDA, "concat", torch.bfloat16, m, n, k, **options)


def test_an_entry_serves_every_m_up_to_its_own(device):
    small, large = replace(CONFIG, num_stages=2), replace(CONFIG, num_stages=4)
    device.write_text(table(entry(m_max=1152, config=large.to_dict()), entry(m_max=576, config=small.to_dict())))
    assert [choose(m) for m in (1, 576, 577, 1152)] == [small, small, large, large]
    assert choose(100_000) == large, "the largest entry serves all beyond"


@pytest.mark.parametrize(
    "few", [GemmConfig(64, 128, 64, split_k=8), GemmConfig(128, 128, 64, 8, 8, 4, form="swap_ab", tail_m=16)], ids=str
)
def test_what_is_for_few_rows_does_not_serve_beyond_the_table(device, few):
    """A table of one image would have 64 images share K out, with gigabytes of parts."""
    device.write_text(table(entry(stage="linear", config=few.to_dict(), m_max=576)))
    found = [tuning.choose(CUDA, "linear", torch.bfloat16, m, 4096, 8192) for m in (576, 577, 36_864)]
    assert found == [few, *(default_config("sm_90", 2, m, 4096) for m in (577, 36_864))]


def test_other_sizes_dtypes_and_devices_get_the_heuristic(device):
    device.write_text(table(entry()))
    assert choose(576, n=4000) == default_config("sm_90", 2, 576, 4000)
    half = tuning.choose(CUDA, "concat", torch.float16, 576, 4096, 8192)
    assert half == default_config("sm_90", 2, 576, 4096)


def test_cublas_is_named_by_the_table_unless_triton_was_asked_for(device):
    device.write_text(table(entry(provider="cublas", config=None)))
    assert choose(576) is None
    assert choose(576, may_decline=False) == default_config("sm_90", 2, 576, 4096)


def choose_wgrad(stage: str = "concat", **options) -> GemmConfig | None:
    return tuning.choose_wgrad(CUDA, stage, torch.bfloat16, 1152, 4096, 8192, **options)


def test_a_weight_gradient_is_the_librarys_until_a_table_names_the_kernel(device):
    """The kernel has run on no hardware: a silent table must not make it anyone's default."""
    device.write_text(table(entry()))
    for stage in ("concat", "merge", "linear", "linear_merge"):
        assert choose_wgrad(stage) is None
        assert choose_wgrad(stage, may_decline=False) == wgrad_tiles("sm_90", 2)[0]
    device.write_text(table(entry(stage="concat_wgrad")))
    lookup._table.cache_clear()
    lookup._choose.cache_clear()
    assert choose_wgrad() == CONFIG
    with pytest.warns(UserWarning, match="does not run.*too large. the library GEMM serves instead"):
        tuning.reject(CUDA, torch.bfloat16, CONFIG, "too large", wgrad=True)
    assert choose_wgrad() is None
    assert choose(1152) == CONFIG, "the forward's kernel of the same tile is another one"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (table(entry(), version=2), "version"),
        (table(entry(), colour="red"), "colour"),
        (table(entry(speed=9)), "speed"),
        (table(entry(config={**CONFIG.to_dict(), "block_q": 1})), "block_q"),
        (table(entry(config={**CONFIG.to_dict(), "block_m": 96})), "block_m"),
        (table(entry(config={"block_m": 64})), "block_k"),
        (table(entry(stage="conv")), "stage"),
        (table(entry(stage="concat_wgrad", config={**CONFIG.to_dict(), "split_k": 2})), "concat_wgrad"),
        (table(entry(stage="concat_wgrad", config=tma_tiles("sm_90", 2)[0].to_dict())), "concat_wgrad"),
        (table(entry(dtype="int8")), "dtype"),
        (table(entry(provider="magic")), "provider"),
        (table(entry(m_max="many")), "m_max"),
        (table(entry(), arch="sm_80"), "arch"),
        (table(entry(config=replace(CONFIG, num_stages=5).to_dict())), "shared memory"),
        (table(entry(config=replace(CONFIG, num_warps=64).to_dict())), "num_warps.*2048 threads"),
        (table(entry(config=replace(CONFIG, block_m=256, num_warps=4, num_stages=1).to_dict())), "255 registers"),
        (table(entry(config=None)), "NoneType"),
        (table(3), "int"),
        (table(), None),
        ("{not json", "Expecting"),
        ("[]", "table"),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_name_and_the_heuristic_serves(device, text, named):
    device.write_text(text)
    if named is None:
        assert choose(576) == default_config("sm_90", 2, 576, 4096)
        return
    with pytest.warns(UserWarning, match=f"test-gpu.json.*{named}"):
        assert choose(576) == default_config("sm_90", 2, 576, 4096)


def test_a_configuration_that_does_not_run_is_replaced_with_one_warning(device):
    device.write_text(table(entry()))
    with pytest.warns(UserWarning, match="test-gpu.*out of shared memory.*stf_kernels.tuning"):
        tuning.reject(CUDA, torch.bfloat16, CONFIG, "out of shared memory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.reject(CUDA, torch.bfloat16, CONFIG, "out of shared memory")
    assert choose(576) == smallest(2)


@pytest.mark.parametrize("arch", [*SHARED_MEMORY_LIMIT, "sm_75", "gfx1100"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_heuristic_fits_every_architecture(arch, itemsize):
    limit = SHARED_MEMORY_LIMIT.get(arch, 65_536 if arch.startswith("gfx") else 101_376)
    for config in (*tiles(arch, itemsize), *split_tiles(arch, itemsize), smallest(itemsize)):
        assert config.shared_bytes(itemsize) <= limit, config
    big, small = (default_config(arch, itemsize, m, 4096) for m in (18432, 16))
    assert big.block_m * big.block_n > small.block_m * small.block_n
    assert big.split_k == small.split_k == 1, "split-K has not run on hardware and is no default"
    assert big.form == small.form == "pointers", "nor have the forms with descriptors"


@pytest.mark.parametrize("field", ["block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages", "split_k"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_configuration_checks_its_fields(field, value):
    with pytest.raises(ValueError, match=field):
        replace(CONFIG, **{field: value})


def test_split_k_is_refused_where_its_barrier_is_none(device, monkeypatch):
    monkeypatch.setattr(lookup, "device_identity", lambda index: ("test-gpu", "gfx942"))
    small = GemmConfig(64, 64, 32, num_stages=2, split_k=4)
    device.write_text(table(entry(config=small.to_dict()), arch="gfx942"))
    with pytest.warns(UserWarning, match="split_k is for NVIDIA"):
        assert choose(576).split_k == 1
    assert split_tiles("gfx942", 2) == []
    assert all(config.split_k > 1 for config in split_tiles("sm_90", 2))


def test_descriptor_forms_are_refused_where_no_tma_is(device, monkeypatch):
    monkeypatch.setattr(lookup, "device_identity", lambda index: ("test-gpu", "sm_80"))
    config = GemmConfig(128, 128, 32, form="tma")
    device.write_text(table(entry(config=config.to_dict()), arch="sm_80"))
    with pytest.warns(UserWarning, match="form 'descriptors'.*Hopper.*sm_80"):
        assert choose(576).form == "pointers"
    for arch, has in (("sm_90", True), ("sm_100", True), ("sm_80", False), ("sm_120", False), ("gfx942", False)):
        assert bool(tma_tiles(arch, 2)) == bool(swap_ab_tiles(arch, 2)) == has
        assert not tma_tiles(arch, 4)


@pytest.mark.parametrize(("stage", "form"), [("merge", "descriptors"), ("merge", "swapped"), ("concat", "swapped")])
def test_a_form_that_a_stage_does_not_have_is_refused(device, stage, form):
    config = GemmConfig(128, 128, 64, 8, 8, 4, form=form, tail_m=16 if form == "swapped" else 0)
    device.write_text(table(entry(stage=stage, config=config.to_dict())))
    with pytest.warns(UserWarning, match=f"stage '{stage}' has no form '{form}'"):
        assert tuning.choose(CUDA, stage, torch.bfloat16, 576, 4096, 8192).form == "pointers"


def test_every_form_fits_shared_memory_and_so_does_what_serves_in_its_place():
    for config in (*tma_tiles("sm_90", 2), *swap_ab_tiles("sm_90", 2)):
        assert config.portable().form == "pointers"
        assert config.portable().shared_bytes(2) <= config.shared_bytes(2) <= SHARED_MEMORY_LIMIT["sm_90"]
        assert config.portable() == config.portable().portable()


def test_without_a_table_the_log_says_how_to_measure_one(device, caplog):
    with caplog.at_level("WARNING", logger="stf_kernels"):  # what is seen where nobody has set up logging
        choose(576)
        choose(1152)
    assert [r.getMessage() for r in caplog.records if "python -m stf_kernels.tuning" in r.getMessage()] == [
        "no table for test-gpu (sm_90): a heuristic serves; `python -m stf_kernels.tuning` measures one"
    ]


def measured(us, rival_us):
    return {"us": us, "rival_us": rival_us}


def test_a_way_to_launch_is_a_default_where_the_table_measured_it_to_be_faster(device, monkeypatch):
    assert not launches.is_default("direct", 0), "no table, no default"
    launches._faster.cache_clear()
    lookup._table.cache_clear()
    device.write_text(table(entry(), launches={"direct": measured(70.0, 150.0), "pdl": measured(191.0, 190.0)}))
    assert launches.is_default("direct", 0)
    assert not launches.is_default("pdl", 0), "measured, and slower"
    assert choose(576) == CONFIG, "the entries serve as ever"
    monkeypatch.setenv("STF_KERNELS_PDL", "1")
    monkeypatch.setenv("STF_KERNELS_DIRECT_LAUNCH", "0")
    assert launches.is_default("pdl", 0)
    assert not launches.is_default("direct", 0)


@pytest.mark.parametrize(
    ("found", "arch", "named"),
    [
        ({"graph": measured(1, 2)}, "sm_90", "launches: .*graph"),
        ([], "sm_90", "launches"),
        ({"direct": 3}, "sm_90", "launches.direct"),
        ({"direct": {"us": 1}}, "sm_90", "launches.direct"),
        ({"direct": measured(-1, 2)}, "sm_90", "launches.direct"),
        ({"direct": measured("1", 2)}, "sm_90", "launches.direct"),
        ({"pdl": measured(1, 2)}, "sm_80", "launches.pdl.*sm_80"),
    ],
)
def test_launches_that_are_wrong_are_refused_with_their_table(device, monkeypatch, found, arch, named):
    monkeypatch.setattr(lookup, "device_identity", lambda index: ("test-gpu", arch))
    device.write_text(table(arch=arch, launches=found))
    with pytest.warns(UserWarning, match=named):
        assert not launches.is_default("direct", 0)


def test_every_shipped_table_is_valid():
    for path in lookup._TABLES.glob("*.json"):
        text = path.read_text()
        assert lookup.parse_table(text, json.loads(text)["arch"]), path.name


def test_a_stage_that_keeps_its_pre_activation_gets_a_smaller_tile(device):
    """The largest tile spills when its epilogue stores two results, whatever a table of inference says."""
    device.write_text(table(entry()))
    assert choose(18432, save_pre=True) == default_config("sm_90", 2, 18432, 4096, save_pre=True)
    assert choose(18432, save_pre=True) != choose(18432)
