"""If this fails, the time on a borrowed GPU is spent on finding a mistake that no GPU is needed to find."""

import json
import signal
import sys
import time
from pathlib import Path

import fake_cuda
import pytest
import torch
from PIL import Image
from sample_results import KERNELS, prefill_result

import stf_kernels.modules
from bench import agreement, environment, gpu, gpu_tests, models, modes, prefill, processes, report, results, roofline
from bench.presets import PRESETS
from bench.speedup import label
from stf_kernels import ops

JUNIT = '<testsuites><testsuite><testcase name="a"/><testcase name="b"/></testsuite></testsuites>'
# What a part's process does here instead of its work: it writes what the part would, with a status of its own.
PRETEND = """
import json, pathlib, sys
path, text, status = sys.argv[1:]
pathlib.Path(path).write_text(text)
print("said", path)
sys.exit(int(status))
"""


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """A prefill as on a GPU: eager and captured, all rows, in bf16 and with device events."""
    path = tmp_path_factory.mktemp("gpu") / "prefill.json"
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda.install(patch)
        build = models.build_stock
        patch.setattr(models, "build_stock", lambda preset, *, device, **rest: build(preset, device="cpu", **rest))
        patch.setattr(environment, "clock_mhz", iter((345.0, 1980.0, 1755.0, 1830.0)).__next__)
        ceilings = roofline.Ceilings(1e14, 1e12, 141e9, "pretended")
        patch.setattr(roofline, "measure_ceilings", lambda *_, **__: ceilings)
        patch.setattr(torch, "compile", lambda function, **_: function)  # a minute of C++ for each row, here
        with fake_cuda.OnCpu():
            arguments = ["--preset", "tiny", "--device", "cuda", "--full", "--modes", "eager", "graph", "compile"]
            status = prefill.main([*arguments, "--rounds", "1", "--images", "2", "--decode", "1", "--json", str(path)])
        events = list(fake_cuda.Event.made)
    return status, results.read(path), events


def test_eager_and_captured_rows_are_measured_as_on_a_gpu(pretended):
    status, result, _ = pretended
    assert status == 0
    assert (result["device"], result["dtype"]) == ("Pretended GPU", "bfloat16")
    modes = [row["mode"] for row in result["rows"]]
    assert modes == ["eager"] * 6 + ["graph"] * 6 + ["compile"] * 6
    for row in result["rows"]:
        assert row["failed"] is None
        assert row["image_tokens"] == 2 * (16 if row["projector"] == "mlp2x" and "pool" not in row["model"] else 4)
        staged = [row[f"{stage}_ms"] is not None for stage in ("vision", "projector", "insert", "prefill")]
        assert staged == [row["mode"] != "compile"] * 4  # the boundaries would break a compiled graph
        assert row["total_ms"] > 0
        assert row["peak_mb"] == pytest.approx(row["weights_mb"] + 2048)  # 3 GiB at the peak, 1 GiB before
        wall = {stage: len(samples) - samples.count(None) for stage, samples in row["wall_samples"].items()}
        assert wall["total_ms"] == (row["mode"] != "compile")  # whose total is the host's clock already
        assert wall["vision_ms"] == (row["mode"] == "eager")
    kv = {(label(row), row["mode"]): row["kv_mb"] for row in result["rows"]}
    assert all(kv[name, "eager"] == kv[name, "graph"] for name, _ in kv)
    saved = {row["mode"]: row["savings"] for row in result["rows"] if label(row) == "llava-stf/fused+savings"}
    on_a_gpu = ["unused-tower-layers", "in-place-insertion"]
    assert saved == {"eager": on_a_gpu, "graph": on_a_gpu, "compile": on_a_gpu[:1]}


def test_captured_rows_are_compared_with_captured_and_with_eager(pretended):
    result = pretended[1]
    found = {(c["row"], c["mode"], c["baseline_mode"]) for c in result["comparisons"]}
    assert {("llava-stf/fused", "graph", "graph"), ("llava-stf/fused", "graph", "eager")} <= found
    across = [check["name"].split(",")[0] for check in result["checks"] if "against its eager run" in check["name"]]
    assert across.count("logits") == 12
    assert across.count("image features") == 6  # those of a compiled run cannot be watched
    assert all(check["agrees"] for check in result["checks"])


def test_clocks_are_taken_behind_the_work_of_every_group(pretended, tmp_path):
    result = pretended[1]
    assert result["clock_mhz"] == 345.0  # idle
    assert result["clocks_mhz"] == [1980.0, 1755.0, 1830.0]
    results.write(tmp_path / "prefill.json", result)
    text = report.write_report([tmp_path / "prefill.json"], tmp_path)[0].read_text()
    assert "1755 to 1980 behind the rounds" in text


def test_only_the_events_inside_a_graph_are_external(pretended):
    events = pretended[2]
    assert all(options["enable_timing"] for options in events)
    external = [options for options in events if options.get("external")]
    # Without a capture, the runner's own call, output() and two warm-up runs and a round record them: four boundaries.
    assert external
    assert len(external) % 4 == 0
    assert len(external) < len(events)


def test_a_captured_row_saves_what_its_eager_run_saves(monkeypatch):
    """The runner itself would skip the unread layer and write in place for every row."""
    stock = models.build_stock(PRESETS["tiny"], device="cpu", dtype=torch.float32, seed=1)
    image, seen = Image.new("RGB", (56, 56)), {}
    fake_cuda.install(monkeypatch)
    chain = stf_kernels.modules.run_chain
    monkeypatch.setattr(stf_kernels.modules, "run_chain", lambda op, *a: chains.append(op) or chain(op, *a))
    for row in models.build_rows(stock, PRESETS["tiny"], full=True):
        inputs = models.build_inputs(
            PRESETS["tiny"], image, batch=1, text_tokens=4, image_tokens=row.image_tokens, device="cpu",
            dtype=torch.float32, seed=1,
        )  # fmt: skip
        run, chains, layers = modes.Captured(row, inputs, "cuda"), [], []
        for layer in row.module.model.vision_tower.encoder.layers:
            layer.register_forward_hook(lambda *_, layers=layers: layers.append(1))
        run.output()
        for layer in row.module.model.vision_tower.encoder.layers:
            layer._forward_hooks.clear()
        seen[row.name] = (len(layers), *chains)
    assert seen == {
        "llava-1.5/mlp2x": (24,), "llava-1.5-skip/mlp2x": (23,), "llava-1.5-pool/mlp2x": (24,),
        "llava-stf/reference": (24,), "llava-stf/fused": (24, ops.compact_token_projector),
        "llava-stf/fused+savings": (23, ops.compact_token_projector_out),
    }  # fmt: skip


def test_one_row_that_a_captured_insertion_misses_is_found(monkeypatch):
    """In bf16 the logits, behind a whole language model, may differ by more than that."""
    stock = models.build_stock(PRESETS["tiny"], device="cpu", dtype=torch.bfloat16, seed=1)
    rows = {row.name: row for row in models.build_rows(stock, PRESETS["tiny"], full=True)}
    row = rows["llava-stf/fused+savings"]
    models.randomise(row.module.model.multi_modal_projector, 2)
    inputs = models.build_inputs(
        PRESETS["tiny"], Image.new("RGB", (56, 56), "red"), batch=2, text_tokens=4, image_tokens=4, device="cpu",
        dtype=torch.bfloat16, seed=1,
    )  # fmt: skip
    fake_cuda.install(monkeypatch)
    with torch.no_grad():
        right, eager = modes.Captured(row, inputs, "cuda").output(), modes.Eager(row, inputs, "cpu").output()
        chain = stf_kernels.modules.run_chain

        def misses_the_last(op, *arguments):
            kept = (out := arguments[-2])[rows := arguments[-1][-1:]]
            chain(op, *arguments)
            out[rows] = kept

        monkeypatch.setattr(stf_kernels.modules, "run_chain", misses_the_last)
        wrong = modes.Captured(row, inputs, "cuda").output()
    assert right.features.shape == (2 * 4, PRESETS["tiny"].dim)
    assert agreement.compare("", right.features, eager.features, agreement.ACROSS).agrees
    assert not agreement.compare("", wrong.features, eager.features, agreement.ACROSS).agrees
    assert agreement.compare("", wrong.logits, eager.logits, agreement.LOGITS).agrees


def test_a_graph_that_takes_no_events_is_still_timed_as_a_whole(monkeypatch):
    stock = models.build_stock(PRESETS["tiny"], device="cpu", dtype=torch.float32, seed=1)
    row = models.Row("llava-1.5", "mlp2x", stock, 16)
    image = Image.new("RGB", (56, 56))
    inputs = models.build_inputs(
        PRESETS["tiny"], image, batch=1, text_tokens=4, image_tokens=16, device="cpu", dtype=torch.float32, seed=1
    )
    fake_cuda.install(monkeypatch)

    def refuse(self):
        if self.options.get("external"):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.at = 1.0

    monkeypatch.setattr(fake_cuda.Event, "record", refuse)
    run = modes.Captured(row, inputs, "cuda")
    assert run.run() == {**dict.fromkeys(modes.STAGES), "total_ms": 0.0}
    assert run.output().logits.shape == (1, PRESETS["tiny"].vocabulary)


@pytest.fixture
def pretend_parts(monkeypatch, tmp_path):
    """bench.gpu with processes that write files at once. `statuses` says how each ends."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STF_COMMIT", "c0ffee")
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: None)
    statuses, limits, commands = {}, {}, []
    real = processes.run_limited
    prefill_text, kernels_text = json.dumps(prefill_result()), json.dumps(KERNELS)

    monkeypatch.setattr(gpu_tests, "WORKERS", 2)

    def pretend(command, seconds, **environment):
        commands.append(command)
        name = command[2].removeprefix("bench.")
        if "--warm" in command or name == "sanitize":
            return 0, ""
        if name == "pytest":
            name = "tests/gpu" if command[-1] == "tests/gpu" else "tests"
            path = next(a.split("=", 1)[1] for a in command if a.startswith("--junitxml="))
            text = JUNIT
        else:
            path = command[command.index("--json") + 1]
            text = prefill_text if name == "prefill" else kernels_text
        limits[name] = seconds
        status = statuses.get(name, 0)
        return real([sys.executable, "-c", PRETEND, path, text, str(status)], seconds, **environment)

    monkeypatch.setattr(processes, "run_limited", pretend)
    return statuses, limits, commands, tmp_path / "out" / "pretended-gpu"


def test_every_part_leaves_its_file_under_out(pretend_parts, capfd):
    _, limits, commands, folder = pretend_parts
    assert gpu.main([]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["kernels.json", "prefill.json", "tests.json"]
    tests = results.read(folder / "tests.json")
    # two tests each of two processes, on the device and beside
    assert (tests["commit"], tests["passed"], tests["failed"], tests["complete"]) == ("c0ffee", 8, 0, True)
    shares = [next((a for a in c if a.startswith("--share")), None) for c in commands if c[2] == "pytest"]
    assert sorted(shares) == ["--share=0/2", "--share=0/2", "--share=1/2", "--share=1/2"]
    assert capfd.readouterr().out.count("passed  ") == 3
    # Nothing is asked of pytest, of git or of a network that a bare machine lacks.
    assert all(command[:2] == [sys.executable, "-m"] for command in commands)
    # A program is told to end before it is stopped.
    for command in commands[-2:]:
        assert float(command[command.index("--budget") + 1]) < limits[command[2].removeprefix("bench.")]


@pytest.mark.parametrize("part", ["tests/gpu", "tests", "kernels", "prefill"])
def test_a_part_that_fails_is_said_and_the_others_still_run(pretend_parts, part, capfd):
    statuses, _, _, folder = pretend_parts
    statuses[part] = 3
    assert gpu.main([]) == 1
    assert len(list(folder.iterdir())) == 3
    failed = [line.split()[1] for line in capfd.readouterr().out.splitlines() if line.startswith("  FAILED")]
    assert failed == [part.split("/")[0]]


def test_an_error_of_a_part_is_not_the_end_of_the_others(pretend_parts, monkeypatch, capfd):
    monkeypatch.setattr(gpu_tests, "read_junit", lambda path: 1 / 0)
    assert gpu.main([]) == 1
    assert "ZeroDivisionError" in capfd.readouterr().out
    assert (pretend_parts[3] / "prefill.json").is_file()


def test_an_old_file_does_not_pass_for_this_run(pretend_parts, monkeypatch, capfd):
    folder = pretend_parts[3]
    results.write(folder / "kernels.json", KERNELS)
    for status in (0, -11):
        monkeypatch.setattr(processes, "run_limited", lambda *_, status=status, **__: (status, ""))  # wrote nothing
        assert gpu.main(["--only", "kernels"]) == 1
        assert f"cannot be read (No such file or directory); exit status {status}" in capfd.readouterr().out


def test_all_parts_together_end_inside_ten_minutes():
    parts, clock = list(gpu.PARTS), gpu.SECONDS
    for index, name in enumerate(parts):
        share = gpu.share_of(clock, parts[index:])
        assert share > 100, f"{name}: too little to measure anything"
        clock -= share + 2 * processes.GRACE if index < len(parts) - 1 else share  # even where each has to be stopped
    assert clock == pytest.approx(0)
    assert gpu.SECONDS + processes.GRACE + 20 < 600
    assert gpu.share_of(545.0, ["kernels"]) == 545.0
    assert gpu.share_of(-3.0, parts) == 0.0


def test_what_a_part_leaves_running_is_ended(capfd):
    """It holds the pipe open and the GPU busy."""
    code = (
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid)"
    )
    status, output = processes.run_limited([sys.executable, "-c", code], 30.0)
    assert status == 0
    stat = Path(f"/proc/{output.strip()}/stat")
    until = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_stopped_measurement_writes_more_than_a_pipe_holds(capfd, monkeypatch):
    """Also where this program is a shell's background job, whose children would ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        assert gpu.main([]) == 2
        status, output = stopped_while_it_saves()
    finally:
        signal.signal(signal.SIGINT, before)
    assert status is None
    assert output.rstrip().endswith("saved")


def stopped_while_it_saves():
    code = (
        "import sys, time\nprint('on', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('x' * 500_000); print('saved'); sys.exit(130)"
    )
    return processes.run_limited([sys.executable, "-c", code], 1.5)
