"""If these fail, a wrong or foreign table decides what runs on a user's GPU, or a good one is not used."""

import json
from dataclasses import replace

import pytest
import torch

from stf_kernels import configs
from stf_kernels.configs import Gemm, GemmConfig, default_config, tables

CONFIG = GemmConfig(128, 256, 64, 8, 8, 3)
TMA = GemmConfig(128, 128, 64, 8, 8, 4, form="tma")
SWAP_AB = GemmConfig(128, 128, 64, 8, 8, 4, form="swap_ab", tail_m=16)
CUDA = torch.device("cuda", 0)


def entry(config: GemmConfig | dict | None = CONFIG, **changes) -> dict:
    values = config.to_dict() if isinstance(config, GemmConfig) else config
    return {
        "stage": "concat", "dtype": "bfloat16", "n": 4096, "k": 8192, "m_max": 768, "save_pre": False, "tf32": False,
        "config": values, "candidates": [{"config": None, "us": 80.0}], **changes,
    }  # fmt: skip


def table(*entries: dict, **changes) -> str:
    top = {"version": 4, "device": "test-gpu", "arch": "sm_90", "made_with": {"torch": "2", "triton": "3"}}
    failed = {"itemsize": 2, "config": CONFIG.to_dict(), "reason": "of another table"}
    return json.dumps({**top, "entries": list(entries), "failed": [failed], **changes})


@pytest.fixture
def use(pretend, tmp_path, monkeypatch):
    """use(text, arch): a GPU of that architecture has that table."""

    def write(text: str, arch: str = "sm_90") -> None:
        pretend(arch)
        monkeypatch.setattr(tables, "_FOLDER", tmp_path)
        tables.table_path("test-gpu").write_text(text)

    return write


def model(m: int, n: int = 4096, k: int = 8192, *, arch: str = "sm_90", **options) -> GemmConfig:
    """What serves when no table matches."""
    return default_config(arch, 2, m, n, k, multiprocessors=132, **options)


def choose(m: int, n: int = 4096, k: int = 8192, *, stage="concat", dtype=torch.bfloat16, save_pre=False, **options):
    return configs.choose(CUDA, Gemm(stage, dtype, m, n, k, save_pre), **options)[0]


def test_configurations_of_shipped_tables(use):
    use(table(entry(), entry(SWAP_AB, stage="linear"), entry(TMA, dtype="float16"), entry(None, m_max=1536)))
    assert tables.shipped_configs("sm_90", "bfloat16") == [CONFIG, SWAP_AB]
    assert tables.shipped_configs("sm_80", "bfloat16") == []


def test_an_entry_serves_the_rows_of_its_bucket(use):
    small, large = replace(CONFIG, num_stages=2), replace(CONFIG, num_stages=4)
    use(table(entry(large, m_max=1536), entry(small, m_max=768)))
    assert [choose(m) for m in (513, 576, 768)] == [small] * 3
    assert [choose(m) for m in (1025, 1536)] == [large] * 2
    assert [choose(m) for m in (512, 769, 1537, 36_864)] == [model(m) for m in (512, 769, 1537, 36_864)]


def test_other_sizes_and_dtypes_get_the_model(use):
    use(table(entry(TMA)))
    assert choose(576) == TMA
    assert choose(576, n=4000) == model(576, n=4000)
    assert choose(576, dtype=torch.float16) == model(576)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "sm_89", "gfx942"])
def test_nothing_to_compute_has_a_configuration_too(pretend, arch):
    """A batch of no images asks as any other does; the cost model must not divide by its tiles."""
    pretend(arch)
    assert choose(0) == choose(1)
    assert choose(576, 0) == choose(576, 1)


def test_torch_is_named_by_the_table_unless_triton_was_asked_for(use):
    use(table(entry(None)))
    assert choose(576) is None
    assert choose(576, forced=True) == model(576)


def test_a_stage_that_keeps_its_pre_activation_gets_a_smaller_tile(use):
    """The largest tile spills when its epilogue stores two results, whatever a table of inference says."""
    use(table(entry()))
    assert choose(576, save_pre=True) == model(576, save_pre=True)
    assert choose(576, save_pre=True) != choose(576) == CONFIG


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (table(entry(), version=3), "version: expected 4, got 3"),  # had weight gradients
        (table(entry(), colour="red"), "colour"),
        (table(entry(speed=9)), "speed"),
        (table({"stage": "concat"}), "'candidates' is missing"),
        (table(entry({**CONFIG.to_dict(), "block_q": 1})), "block_q"),
        (table(entry({**CONFIG.to_dict(), "block_m": 96})), "block_m"),
        (table(entry({"block_m": 64})), "block_k"),
        (table(entry(stage="conv")), "stage"),
        (table(entry(TMA, stage="merge")), "stage 'merge' has no form 'tma'"),
        (table(entry(SWAP_AB, stage="merge")), "stage 'merge' has no form 'swap_ab'"),
        (table(entry(SWAP_AB)), "stage 'concat' has no form 'swap_ab'"),
        (table(entry(replace(CONFIG, pdl=True), dtype="float32")), "pdl True.*16 bit"),
        (table(entry(dtype="int8")), "dtype"),
        (table(entry(m_max=["many"])), "unhashable"),
        # AMD's barrier does not publish a part, and nothing before Hopper has TMA
        (table(entry(GemmConfig(64, 64, 32, num_stages=2, split_k=4)), arch="gfx942"), "split_k is for NVIDIA"),
        (table(entry(GemmConfig(128, 128, 32, form="tma")), arch="sm_80"), "form 'tma'.*Hopper.*sm_80"),
        (table(entry(GemmConfig(128, 128, 32, pdl=True)), arch="sm_80"), "pdl True.*Hopper.*sm_80"),
        (table(entry(), device="another"), "device"),
        (table(entry(replace(CONFIG, num_stages=5))), "shared memory"),
        (table(entry(replace(CONFIG, num_warps=64))), "num_warps.*2048 threads"),
        (table(entry(replace(CONFIG, block_m=256, num_warps=4, num_stages=1))), "255 registers"),
        (table(entry(candidates=[{"us": 3.0}])), "candidates: field 'config' is missing"),
        (table(3), "entries.0.: expected an object, got int"),
        ("{not json", "Expecting"),
        ("[]", "table"),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_name_and_the_model_serves(use, text, named):
    arch = "gfx942" if "gfx942" in text else "sm_80" if "sm_80" in text else "sm_90"
    use(text, arch)
    with pytest.warns(UserWarning, match=f"test-gpu.json.*{named}"):
        assert choose(576) == model(576, arch=arch)


def test_every_shipped_table_is_valid():
    for path in tables._FOLDER.glob("*.json"):
        text = path.read_text()
        assert tables.Table(path, path.stem, json.loads(text)["arch"]).parse(text), path.name
