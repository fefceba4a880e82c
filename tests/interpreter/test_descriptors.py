"""If this fails, a kernel that fetches its tiles by descriptor computes another result, or is chosen for operands that
a descriptor cannot name."""

import pytest
import torch
from support.rule import assert_within_rule

from reference.functional import activate
from stf_kernels.ops import forms
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage, merge_windows
from stf_kernels.configs import GemmConfig

DESCRIPTORS = [
    GemmConfig(64, 32, 16, form="tma"),
    GemmConfig(128, 16, 32, group_m=2, form="tma"),
    GemmConfig(192, 32, 32, group_m=1, form="tma"),
    GemmConfig(256, 64, 16, form="tma"),
]
SWAPPED = [
    GemmConfig(16, 32, 16, form="swap_ab", tail_m=16),
    GemmConfig(128, 16, 32, group_m=1, form="swap_ab", tail_m=16),
    GemmConfig(32, 32, 32, form="swap_ab", tail_m=16, split_k=3),
    GemmConfig(32, 64, 16, form="swap_ab", tail_m=32, split_k=16),  # more parts than steps
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture
def used(monkeypatch):
    """The forms that were really launched: a launch that falls back to pointers would prove nothing."""
    seen = []
    for form in ("_by_pointers", "_by_descriptors", "_swapped"):
        launch = getattr(forms.Call, form)

        def spy(self, *arguments, _form=form, _launch=launch):
            seen.append(_form)
            return _launch(self, *arguments)

        monkeypatch.setattr(forms.Call, form, spy)
    return seen


def cropped_blocks(count, batch, tokens, c, dtype, *, gap=0):
    """Blocks as a tower gives them: slices of one allocation, CLS cut off by a view, `gap` elements between them."""
    size = batch * (tokens + 1) * c
    memory = torch.randn(count * (size + gap)).to(dtype)
    views = [memory[i * (size + gap) :][:size].view(batch, tokens + 1, c) for i in range(count)]
    for view in views:
        view[:, 0] = float("nan")  # what is skipped must not be read into a sum
    return [view[:, 1:] for view in views]


def check(stage, config, dtype, blocks, n, *, place=lambda y: y):
    k = len(blocks) * blocks[0].shape[-1]
    weight, bias = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)
    y, pre = run_stage(blocks, weight, bias, stage, config, save_pre=True)

    def run(to):
        flat = torch.cat([b.to(to) for b in blocks], -1).flatten(0, 1) @ weight.to(to).t() + bias.to(to)
        return flat, place(activate(flat, stage.activation).view(blocks[0].shape[0], -1, n))

    (same_pre, same), (exact_pre, exact) = run(dtype), run(torch.float64)
    assert_within_rule("pre-activation", pre, same_pre, exact_pre)
    assert_within_rule("output", y, same, exact)


@DTYPES
@pytest.mark.parametrize("config", DESCRIPTORS, ids=str)
@pytest.mark.parametrize(("count", "batch", "tokens"), [(3, 3, 64), (8, 2, 192), (1, 2, 128), (2, 1, 100)])
def test_blocks_of_a_tower(used, config, dtype, count, batch, tokens):
    check(Stage("gelu"), config, dtype, cropped_blocks(count, batch, tokens, 32, dtype, gap=32), 40)
    assert used == ["_by_descriptors"]


@pytest.mark.parametrize("config", DESCRIPTORS, ids=str)
def test_blocks_in_any_order_of_addresses(used, config):
    blocks = cropped_blocks(4, 2, 64, 32, torch.float32, gap=4)
    check(Stage(), config, torch.float32, [blocks[i] for i in (2, 0, 3, 2)], 24)
    assert used == ["_by_descriptors"]


@DTYPES
@pytest.mark.parametrize("config", SWAPPED, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "c", "n"), [(1, 144, 48, 80), (2, 9, 40, 33), (1, 300, 16, 16)])
def test_swapped(used, config, dtype, batch, tokens, c, n):
    """Tails of rows, features and columns: K need not be a multiple of the tile's."""
    check(Stage("gelu"), config, dtype, [torch.randn(batch, tokens, c).to(dtype)], n)
    assert used == ["_swapped"]


@pytest.mark.parametrize("config", [*DESCRIPTORS[:2], SWAPPED[2]], ids=str)
def test_merged_store(used, config):
    grid = (8, 9)  # the last column is stored nowhere

    def place(y):
        return merge_windows(y, grid, 2)

    check(Stage(merge_out=2, grid=grid), config, torch.float32, [torch.randn(2, 72, 32)], 24, place=place)
    assert used != ["_by_pointers"]


@pytest.mark.parametrize("config", [DESCRIPTORS[0], DESCRIPTORS[2], SWAPPED[1], SWAPPED[2]], ids=str)
def test_scattered_rows(used, config):
    x, weight = torch.randn(1, 70, 32), torch.randn(20, 32)
    out, rows = torch.full((80, 20), 7.0), torch.randperm(80)[:70]
    rows[3], rows[4] = 80, -1
    y, _ = run_stage([x], weight, None, Stage(), config, out=out, rows=rows)
    plain = run_stage([x], weight, None, Stage(), config.portable())[0][0]
    inside = [i for i in range(70) if 0 <= rows[i] < 80]
    torch.testing.assert_close(y[rows[inside]], plain[inside])
    assert bool((y[[row for row in range(80) if row not in set(rows[inside].tolist())]] == 7).all())
    assert used[0] != "_by_pointers"


def unaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize(
    ("why", "make", "config"),
    [
        ("boxes would cross images", lambda: cropped_blocks(2, 2, 60, 32, torch.float32), DESCRIPTORS[0]),
        ("a step would cross segments", lambda: cropped_blocks(2, 1, 64, 40, torch.float32), DESCRIPTORS[0]),
        ("unlike strides", lambda: [torch.randn(2, 64, 32), torch.randn(64, 2, 32).transpose(0, 1)], DESCRIPTORS[0]),
        ("an address off 16 bytes", lambda: [unaligned(torch.randn(1, 64, 32))], DESCRIPTORS[0]),
        ("blocks an odd distance apart", lambda: cropped_blocks(2, 1, 64, 32, torch.float32, gap=3), DESCRIPTORS[0]),
        ("a pitch off 16 bytes", lambda: [torch.randn(1, 64, 33)[..., :32]], DESCRIPTORS[0]),
        ("an expanded image", lambda: [torch.randn(1, 64, 32).expand(2, -1, -1)], DESCRIPTORS[0]),
        ("rows of two pitches", lambda: [torch.randn(2, 65, 32)[:, 1:]], SWAPPED[0]),
        ("several blocks", lambda: cropped_blocks(2, 1, 64, 32, torch.float32), SWAPPED[0]),
        ("an address off 16 bytes", lambda: [unaligned(torch.randn(1, 64, 32))], SWAPPED[2]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operands_that_no_descriptor_names_take_the_pointers(used, why, make, config):
    check(Stage("silu"), config, torch.float32, make(), 40)
    assert used == ["_by_pointers"], why


@pytest.mark.parametrize("config", [DESCRIPTORS[0], SWAPPED[0]], ids=str)
def test_gathering_takes_the_pointers(used, config):
    x, weight = torch.randn(1, 64, 16), torch.randn(40, 64)
    stage = Stage(merge_in=2, grid=(8, 8))
    y, _ = run_stage([x], weight, None, stage, config)
    torch.testing.assert_close(y, merge_windows(x, (8, 8), 2) @ weight.t(), atol=1e-4, rtol=1e-4)
    assert used == ["_by_pointers"]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"form": "tma"}, "form.*swapped.*tma"),
        ({"form": "descriptors", "block_m": 32}, "block_m of 64"),
        ({"form": "descriptors", "split_k": 2}, "do not split K"),
        ({"form": "swapped"}, "tail_m.*16.*got 0"),
        ({"form": "swapped", "tail_m": 128}, "tail_m.*64.*got 128"),
        ({"form": "pointers", "tail_m": 16}, r"tail_m.*\[0\] for pointers.*16"),
        ({"form": "pointers", "block_m": 192}, "block_m.*power of two.*192"),
    ],
    ids=str,
)
def test_forms_that_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        GemmConfig.from_dict({"block_m": 64, "block_n": 32, "block_k": 32, **values})
