"""If these fail, the first call of a product returns something wrong or raises, selects what is wrong or slow, selects
again, or selects where it must not. (conftest.py has the GPU.)
"""

import fcntl
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from stf_kernels import configs
from stf_kernels.configs import Gemm, selection, tables
from stf_kernels.ops import first_use, launch, tma, torch_path
from stf_kernels.ops.segments import Stage

X, WEIGHT = torch.randn(2, 72, 128).bfloat16(), torch.randn(256, 128).bfloat16() / 11
BIAS, GELU = torch.randn(256).bfloat16(), Stage("gelu")
GEMM = Gemm("linear", torch.bfloat16, 144, 256, 128)


def call(x=X, **options):
    """One call of the product; its result is right whatever happens."""
    y, pre = launch.run_stage([x], WEIGHT, BIAS, GELU, **options)
    expected, expected_pre = torch_path.run_stage([x], WEIGHT, BIAS, GELU, True)
    assert torch.equal(y, expected)
    assert pre is None or torch.equal(pre, expected_pre)
    return y


def candidates():
    return selection.contenders(0, GEMM)


def served():
    """By what the next call computes; None is plain torch."""
    return configs.choose(X.device, GEMM)[0]


def test_candidates_are_the_best_few_of_every_form(gpu):
    forms = {(config.form, config.split_k > 1) for config in candidates()}
    assert forms == {("pointer", False), ("pointer", True), ("tma", False), ("swap_ab", False), ("swap_ab", True)}
    assert len(candidates()) <= 10
    several = selection.contenders(0, Gemm("concat", torch.bfloat16, 64 * 576, 4096, 8192))
    assert {config.split_k for config in several} == {1}, "parts of gigabytes"


def test_the_fastest_that_is_right_serves_and_nothing_is_asked_again(gpu, caplog):
    slow, fast, *rest = candidates()
    gpu.us[fast] = 30.0
    call()
    assert gpu.selections == 1
    assert {config for config, _ in gpu.ran} == {slow, fast, *rest}
    assert all(poisoned for _, poisoned in gpu.ran[: len(rest) + 2]), "outputs and workspaces hold NaN"
    [record] = caplog.records
    assert (record.name.split(".")[0], record.levelname) == ("stf_kernels", "WARNING")
    line = record.getMessage()
    assert all(part in line for part in ("linear bfloat16 m 144 n 256 k 128", str(fast), "30.0 us (torch: 50.0 us)"))
    gpu.ran.clear()
    call()
    call(torch.randn(2, 70, 128).bfloat16())  # 140 rows of the same bucket
    assert [config for config, _ in gpu.ran] == [fast] * 2
    assert gpu.selections == 1
    tables.cache_of.cache_clear()  # another process
    gpu.ran.clear()
    call()
    assert ([config for config, _ in gpu.ran], gpu.selections) == ([fast], 1)


def test_training_and_other_buckets_are_other_problems(gpu):
    for number, options in enumerate(({}, {"save_pre": True}, {"x": X[:, :40].contiguous()}), 1):
        call(**options)
        call(**options)
        assert gpu.selections == number
    rows = [GEMM._replace(m=m).key()[4] for m in (1, 2, 3, 4, 5, 96, 97, 144, 576, 1152)]
    assert rows == [1, 2, 3, 4, 6, 96, 128, 192, 768, 1536]


@pytest.mark.parametrize(("torch_us", "us"), [(50.0, 49.5), (1000.0, 985.0), (50.0, 46.0)])
def test_plain_torch_wins_within_the_noise_but_not_where_triton_is_forced(gpu, torch_us, us):
    """And where the device would save less than a launch costs the host."""
    first, second, *_ = candidates()
    gpu.us |= dict.fromkeys(candidates(), 2 * torch_us) | {None: torch_us, first: us, second: 1.1 * us}
    call()
    assert served() is None
    assert None in launch._chosen.values(), "what is plain torch's is not chosen again"
    gpu.ran.clear()
    call(forced=True)
    assert gpu.ran[0][0] == first


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ("wrong", "wrong: an error of"),
        ("a row not written", "wrong: "),
        ("does not compile", "PassManager::run failed"),
        (ValueError("a bug in a launcher"), "ValueError: a bug in a launcher"),
    ],
    ids=str,
)
def test_what_is_wrong_or_does_not_run_is_named_once_and_never_asked_again(gpu, planted, reason):
    bad, good, *_ = candidates()
    gpu.planted[bad] = planted
    gpu.us |= {bad: 1.0, good: 30.0}
    with pytest.warns(UserWarning, match="not used on test-gpu any more") as warned:
        call()
    assert len(warned) == 1
    assert str(bad) in str(warned[0].message)
    assert reason in str(warned[0].message)
    assert served() == good
    tables.cache_of.cache_clear()
    gpu.ran.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(save_pre=True)
    assert bad not in {config for config, _ in gpu.ran}
    assert bad not in candidates()


def test_what_is_wrong_at_one_product_serves_no_other_any_more(gpu):
    bad, *_ = candidates()
    gpu.us[bad] = 30.0
    call()
    gpu.planted[bad] = "wrong"
    with pytest.warns(UserWarning, match="not used on test-gpu any more"):
        call(save_pre=True)
    gpu.ran.clear()
    call()
    assert not gpu.ran


def test_a_row_between_those_that_are_compared_with_float64(gpu, monkeypatch):
    monkeypatch.setattr(first_use, "ROWS", 2)  # the first and the last
    bad, *_ = candidates()
    gpu.planted[bad] = "a row not written"
    with pytest.warns(UserWarning, match="some rows are far from plain torch's, or were not written"):
        call()


@pytest.mark.parametrize("how", ["a file in the way", "locked"])
def test_where_nothing_can_be_written_it_serves_its_process(gpu, how, monkeypatch, tmp_path):
    path = tables.cache_of("test-gpu", "sm_90").path
    if how == "locked":
        other = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(tables, "_LOCK_SECONDS", 0.1)
    else:
        path.with_suffix(".lock").mkdir()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for rows in (72, 72, 20):
            call(X[:, :rows].contiguous())
    [warning] = warned
    assert "cannot be written, so what is selected serves this process alone" in str(warning.message)
    assert gpu.selections == 2


def test_operands_that_do_not_suit_a_descriptor_are_nobodys_fault(gpu):
    refused = next(config for config in candidates() if config.form == "tma")
    gpu.planted[refused] = tma.Refused("no descriptor")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert refused in candidates()


def test_out_of_memory_is_tried_again_a_few_times(gpu, caplog):
    tried = candidates()[1]
    gpu.planted[tried] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    for attempt in (1, 2):
        call()
        assert (
            f"OutOfMemoryError: CUDA out of memory. Tried to allocate. Plain torch serves; attempt {attempt}"
            in caplog.text
        )
    assert not launch._chosen
    del gpu.planted[tried]
    gpu.us[tried] = 30.0
    call()
    assert served() == tried
    gpu.planted[tried] = torch.OutOfMemoryError("again")
    for _ in range(5):
        gpu.ran.clear()
        call(X[:, :40].contiguous())
    assert not gpu.ran, "plain torch serves without another attempt"
    assert "attempt 3 of 3" in caplog.text


def test_an_interrupted_selection_leaves_everything_as_it_was(gpu, tmp_path):
    gpu.planted[candidates()[2]] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        call()
    assert not list(tmp_path.iterdir())
    gpu.planted.clear()
    call()
    assert gpu.selections == 1


def test_a_device_that_dies_is_the_users_to_see_and_its_killer_is_not_met_again(gpu, caplog):
    killer = candidates()[0]
    gpu.planted[killer] = "dies"
    with pytest.warns(UserWarning, match="not used"), pytest.raises(RuntimeError, match="illegal memory access"):
        call()
    assert "does not answer any more" in caplog.text
    tables.cache_of.cache_clear()
    gpu.alive = True
    call()
    assert gpu.selections == 1
    assert killer not in candidates()


def test_a_mistake_of_the_selection_does_not_cost_the_call(gpu, monkeypatch, caplog):
    monkeypatch.setattr(first_use, "measure", lambda *_: 1 / 0)
    call()
    assert "ZeroDivisionError: division by zero. Plain torch serves" in caplog.text


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (torch.cuda, "is_current_stream_capturing"),
        (torch.compiler, "is_compiling"),
        (selection, "selects"),
        (torch, "are_deterministic_algorithms_enabled"),
    ],
)
def test_where_nothing_is_selected_the_model_serves(gpu, monkeypatch, where, why, caplog):
    off = where in (selection, torch)
    with monkeypatch.context() as patch:
        patch.setattr(where, why, lambda: why != "selects")
        for _ in range(2):
            call()
        model = configs.default_config("sm_90", 2, 144, 256, 128, multiprocessors=132)
        assert [config for config, _ in gpu.ran] == [model] * 2
        assert len([m for m in caplog.messages if "a model of the device serves" in m]) == (not off)
        assert gpu.selections == 0
        selection._model.cache_clear()
        patch.setattr(selection, "copy_cycles", lambda *_: float("-inf"))
        launch.forget()
        call()
        assert served() is None, "plain torch where the model says so"
        assert configs.choose(X.device, GEMM, forced=True)[0] == model
    if why == "selects":  # a process has it from its beginning
        launch.forget()
    call()
    assert gpu.selections == 1


NOTHING, NAN, HALF = torch.zeros_like(X), torch.full_like(X, float("nan")), torch.arange(128) < 64


@pytest.mark.parametrize(
    ("x", "weight", "planted"),
    [(NOTHING, WEIGHT, "does not read x"), (NAN, WEIGHT, "does not read x"), (X, WEIGHT * HALF, "half of K")],
    ids=["zeros", "nan", "a warm start"],
)
def test_operands_that_tell_nothing_are_replaced(gpu, x, weight, planted):
    """A first call is often made on zeros, where every kernel is right, or on what memory held, where none is; half of
    a warm start's columns are zero, and will not be once it is trained."""
    bad, good, *_ = candidates()
    gpu.planted[bad] = planted
    gpu.us |= {bad: 1.0, good: 30.0}
    with pytest.warns(UserWarning, match=f"not used.*: {re.escape(str(bad))}: wrong[^;]*$"):
        launch.run_stage([x], weight, BIAS, GELU)
    assert served() == good


def test_another_threads_capture_is_nobodys_fault(gpu, monkeypatch, caplog):
    """It forbids every thread to allocate and to wait."""
    error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    gpu.planted[candidates()[0]] = error
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda *_: (_ for _ in ()).throw(error))
        call()
    assert "when stream is capturing. Plain torch serves; attempt 1 of 3" in caplog.text
    gpu.planted.clear()
    call()
    assert gpu.selections == 1
    assert len({config for config, _ in gpu.ran}) == len(candidates())


def test_what_another_process_has_selected_is_taken(gpu):
    first = candidates()[0]
    gpu.us[first] = 30.0
    own = tables.cache_of("test-gpu", "sm_90")
    call()
    own.known.clear()
    own.failed.clear()
    launch.forget()
    call()
    assert (served(), gpu.selections) == (first, 1)


def test_trials_do_not_write_into_what_is_the_callers(gpu):
    """An out that is the operand itself: its rows are read by every trial, and written by the call alone."""
    memory = torch.randn(200, 256).bfloat16()
    x, weight, before = memory[:144, :128].view(1, 144, 128), WEIGHT, memory.clone()
    rows = torch.arange(50, 194).flip(0)
    gpu.us[candidates()[0]] = 1.0
    gpu.planted = dict.fromkeys(candidates()[1:], "wrong")
    expected, _ = torch_path.run_stage([before[:144, :128].view(1, 144, 128)], weight, BIAS, GELU)
    with pytest.warns(UserWarning, match="not used"):
        out, _ = launch.run_stage([x], weight, BIAS, GELU, out=memory, rows=rows)
    assert out is memory
    before[rows] = expected[0]
    assert torch.equal(memory, before)


def test_threads_select_once(gpu):
    began = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: (began.wait(), call()), range(4)))
    assert gpu.selections == 1


@pytest.mark.parametrize(
    "stage", [Stage("gelu", merge_in=2, grid=(7, 6)), Stage(merge_out=2, grid=(7, 6)), GELU], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_exact_rows_are_those_of_the_results(stage, dtype, monkeypatch):
    """Of merged layouts too, with rows and columns that are in no window, and where an image is padding."""
    monkeypatch.setattr(first_use, "AT_ONCE", 4)
    blocks = [torch.randn(3, 43, 16).to(dtype)[:, 1:] for _ in range(1 if stage.merge_in > 1 else 2)]
    weight = torch.randn(24, stage.num_segments(blocks) * 16).to(dtype)
    for block in blocks:
        block[1] = 0
    product = first_use.Product(launch.ARGUMENTS, blocks, weight, None, stage)
    expected = first_use.Expected(product)
    assert expected.tells
    assert expected.allowed[0] > 2 * first_use.ONE_SUM * expected.exact[0].square().mean().sqrt(), "one long sum"
    assert expected.allowed[0] < (0.5 if dtype == torch.bfloat16 else 1e-3)
    assert expected.differs(product.library()) is None
    assert first_use.Expected(product.drawn()).tells
    assert first_use.draw(blocks[0]).stride() == blocks[0].stride()


def test_the_variable_that_turns_it_off(monkeypatch):
    for value, selects in (("off", False), ("first_use", True), ("", True)):
        monkeypatch.setenv("STF_KERNELS_SELECT", value)
        assert selection.selects.__wrapped__() is selects
    monkeypatch.setenv("STF_KERNELS_SELECT", "on")
    with pytest.raises(ValueError, match="STF_KERNELS_SELECT: expected 'first_use' or 'off', got 'on'"):
        selection.selects.__wrapped__()


def test_tf32_and_fast_activations_are_for_cuda_alone(monkeypatch):
    assert [launch.fast_activation(dtype) for dtype in (torch.float32, torch.float16)] == [0, 2]
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert selection.uses_tf32(torch.float32)
    assert not selection.uses_tf32(torch.float16)
    monkeypatch.setattr(torch.version, "hip", "6")
    assert not selection.uses_tf32(torch.float32)
    assert launch.fast_activation(torch.float16) == 1


def test_room_beside_what_torch_has_exact(gpu):
    """Of small integers: in fp32 another order of the sum is no error, in 16 bit everybody sums in fp32."""
    x, weight = (torch.randint(-9, 9, shape) for shape in ((1, 72, 128), (64, 128)))
    for dtype in (torch.float32, torch.float16):
        product = first_use.Product(launch.ARGUMENTS, [x.to(dtype)], weight.to(dtype) / 1024, None, Stage())
        assert (first_use.Expected(product).allowed[0] > 5e-6) == (dtype == torch.float32)


def test_nothing_to_compute_selects_nothing(gpu):
    launch.run_stage([X[:0]], WEIGHT, BIAS, GELU)
    launch.run_stage([X], WEIGHT[:0], None, GELU)
    assert gpu.selections == 0
