"""If this fails, a command ends in a traceback, runs on after Ctrl-C, leaves a child, or lets --help wait for torch.

The real commands run, and small programs on stf_kernels.command stand for what cannot be had of them at will.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from stf_kernels import command
from tests.support.processes import ROOT, clean_environment, python

FOLDERS = ("stf_kernels", "llava_integration", "bench")
SOURCES = {path: path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
ENDING = '\nif __name__ == "__main__":\n'
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path, source in SOURCES.items()
    if ENDING in source
)
# Arguments with which a command imports torch; without a GPU or a folder it then has nothing to do.
IMPORTING = {
    "llava_integration.convert": ["official", "/nowhere", "/nowhere/dst"],
    "bench.prefill": ["--preset", "tiny"],
    # without torch, or nothing without a folder that it has read before
    **dict.fromkeys(("bench.report", "bench.quality", "bench.serving", "stf_kernels.hub")),
    **dict.fromkeys(("llava_integration.chat", "llava_integration.train")),
}


def start(*arguments):
    """In a group of its own; a shell's background job and nohup ignore signals, and so would what they start."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def group(process):
    """The processes of a command's group, those that ended and wait for their parent left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _parent, of = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat.parent.name] if of == str(process.pid) and state != "Z" else []
    return found


def interrupted(process, send, code=130):
    """Long before it would end by itself, with nothing said and nobody left -> its stdout.

    It has command.GRACE to unwind, which a busy machine stretches.
    """
    send()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in err, "Exception" in err) == (code, False, False), err
    until(lambda: not group(process))
    return out


def program(body):
    """As a command, so that nothing imports torch."""
    started = "import sys, time, os, signal\nsys.orig_argv = ['python', '-m', 'bench.host']\n"
    return f"{started}from stf_kernels import command\n{body}\ncommand.run(main)"


def test_every_command_ends_by_the_same_helper_within_two_seconds():
    assert command.GRACE <= 1.5
    assert {"bench.host", "bench.prefill", "llava_integration.convert", "stf_kernels.aot"} <= set(COMMANDS)
    for path, source in SOURCES.items():
        if ENDING in source:
            assert source.endswith((f"{ENDING}    run(main)\n", f"{ENDING}    command.run(main)\n")), path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command, tmp_path):
    """Without torch, and in less than a second of this process's time: a loaded machine gives it later."""
    for name in ("torch", "transformers", "jinja2"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-m", command, "--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: python -m {command}" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("command", [command for command in COMMANDS if IMPORTING.get(command, ()) is not None])
def test_ctrl_c_while_torch_is_imported(command):
    process = start("-m", command, *IMPORTING.get(command, ()))
    maps = Path(f"/proc/{process.pid}/maps")
    until(lambda: process.poll() is not None or "libtorch" in maps.read_text())
    assert process.poll() is None, "it has ended without torch: give it arguments in IMPORTING"
    interrupted(process, lambda: process.send_signal(signal.SIGINT))


@pytest.mark.parametrize("kill", [os.killpg, os.kill], ids=["of a terminal", "of one process"])
def test_ctrl_c_ends_the_compiler_and_its_workers(kill):
    pytest.importorskip("triton")
    process = start("-m", "stf_kernels.aot", "--target", "sm_80", "--jobs", "2")
    until(lambda: len(group(process)) >= 4)  # itself, multiprocessing's tracker, two workers
    interrupted(process, lambda: kill(process.pid, signal.SIGINT))


STUCK = {
    "a long call into C": """
import hashlib
def main(): print(1, flush=True); hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)""",
    "swallowed by an except": """
def main():
    print(1, flush=True)
    while True:
        try: time.sleep(600)
        except BaseException: pass""",
    "another error in its place": """
def main():
    print(1, flush=True)
    try: time.sleep(600)
    except KeyboardInterrupt: raise ValueError("a pool of workers is broken")""",
    "in a destructor": """
class Slow:
    def __del__(self): print(1, flush=True); time.sleep(600)
def main(): Slow(); time.sleep(600)""",
    "a thread that goes on": """
import threading
def main(): threading.Thread(target=time.sleep, args=(600,)).start(); print(1, flush=True); time.sleep(600)""",
    "children, one of them forked": """
import subprocess
def main():
    with command.shielded(): child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if os.fork() == 0: time.sleep(600)
    print(1, flush=True)
    child.wait()""",
    "saved on the way": """
command.GRACE = 60
def main():
    try: print(1, flush=True); time.sleep(600)
    except KeyboardInterrupt: time.sleep(0.3); print("saved"); return 0""",
}


@pytest.mark.parametrize("what", STUCK)
def test_ctrl_c_wherever_it_comes(what):
    process = start("-c", program(STUCK[what]))
    assert process.stdout.readline() == "1\n"
    time.sleep(0.1)  # most often it is inside by then
    out = interrupted(process, lambda: os.killpg(process.pid, signal.SIGINT))
    assert out == ("saved\n" if what == "saved on the way" else "")


def test_a_line_is_written_once_whenever_ctrl_c_comes():
    """Here: when the line has reached its reader, and the buffer still holds it."""
    body = """
def main():
    def written(frame, event, _):
        if event == "return" and frame.f_code is command._Stream.write.__code__:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)
    sys.setprofile(written)
    try: print(1, flush=True); time.sleep(600)
    except KeyboardInterrupt: print("saved")"""
    assert interrupted(start("-c", program(body)), lambda: None) == "1\nsaved\n"


def test_a_command_may_carry_on():
    """Ctrl-C ended an answer: nothing is cut short later, and the next Ctrl-C ends the command."""
    body = """
def main():
    try: print(1, flush=True); time.sleep(600)
    except KeyboardInterrupt: command.carry_on(); time.sleep(command.GRACE + 0.3)
    print(2, flush=True)
    time.sleep(600)"""
    process = start("-c", program(body))
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "2\n"
    interrupted(process, lambda: process.send_signal(signal.SIGINT))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_end_it_alike(sent, code):
    process = start("-c", program("def main(): print(1, file=sys.stderr); time.sleep(600)"))
    assert process.stderr.readline() == "1\n"  # at once
    interrupted(process, lambda: process.send_signal(sent), code)


def test_nohup_outlives_its_terminal():
    """SIGHUP is ignored then, and what it writes to stderr has no taker."""
    body = "def main(): print(1, flush=True); time.sleep(0.5); print('x', file=sys.stderr); print(2); return 3"
    process = start("-c", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + program(body))
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGHUP)
    process.stderr.close()
    assert (process.stdout.read(), process.wait(30)) == ("2\n", 3)


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("| true", 141, ""),
        ("> /dev/full", os.EX_IOERR, "error: stdout: No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("2> /dev/full", 0, ""),
    ],
)
def test_where_the_output_goes(redirection, status, said, tmp_path):
    """The job, a file in the working folder, is done in every case."""
    body = f"""
import select
def main():
    reader = select.poll()
    reader.register(1, 0)
    if {redirection!r} == "| true": reader.poll()  # until it has gone
    print("progress", file=sys.stderr)
    open({str(tmp_path / "done")!r}, "w").close()
    print("report")
    return 0"""
    file = tmp_path / "program.py"
    file.write_text(program(body))
    script = f"{sys.executable} {file} {redirection}; exit ${{PIPESTATUS[0]}}"
    options = {"cwd": ROOT, "env": clean_environment(), "timeout": 300}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, **options)
    assert done.returncode == status
    assert done.stderr.removeprefix("progress\n").endswith(said)
    assert done.stderr.count("\n") <= 2
    assert (tmp_path / "done").is_file()


def test_a_file_on_a_full_disk_is_one_sentence():
    done = python("-c", program("def main(): open('/dev/full', 'w').write('x' * 10**6)"))
    assert (done.returncode, done.stderr.count("\n")) == (os.EX_IOERR, 1), done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_stdout_cannot_encode(encoding):
    done = python("-c", program("def main(): print('模型', '\\udce9'); return 3"), PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (3, "\\u6a21\\u578b \\udce9\n", "")


@pytest.mark.parametrize("mistake", ["{}['x']", "__import__('stf_kernels.nothing')"])
def test_a_mistake_of_ours_keeps_its_traceback(mistake):
    done = python("-c", program(f"def main(): {mistake}"))
    assert (done.returncode, "Traceback" in done.stderr) == (1, True)


def test_names_come_when_they_are_asked_for():
    """A command's packages have imported nothing; then every public name is there, the Auto classes know the model."""
    code = """
import sys
sys.orig_argv = ["python", "-m", "bench.host"]
import stf_kernels, llava_integration, llava_integration.convert
assert "torch" not in sys.modules
for package in (stf_kernels, llava_integration, llava_integration.convert):
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert not hasattr(package, "nothing")
from transformers import AutoConfig
assert type(AutoConfig.for_model("llava_stf")) is llava_integration.LlavaStfConfig
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


MISSING = "raise ModuleNotFoundError(\"No module named '{0}'\", name='{0}')"
PACKAGES = {
    "transformers": MISSING.format("transformers"),
    "huggingface_hub": MISSING.format("huggingface_hub"),  # which is imported first where both are missing
    "old": "__version__ = '4.57.0'",
}


@pytest.mark.parametrize("how", ["import", "command"])
@pytest.mark.parametrize("what", PACKAGES)
def test_a_missing_or_old_package_says_what_to_install(what, how, tmp_path):
    package = "transformers" if what == "old" else what
    (tmp_path / f"{package}.py").write_text(PACKAGES[what])
    arguments = ["-m", "llava_integration.convert", "llava", "/nowhere", "/nowhere/dst"]
    arguments = ["-c", "import llava_integration"] if how == "import" else arguments
    done = python(*arguments, PYTHONPATH=f"{tmp_path}:{ROOT}")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == (1 if how == "import" else 2), done.stderr
    assert f"{package} is" in last
    assert last.endswith("pip install --upgrade 'stf-kernels[llava]'")
    assert how == "import" or done.stderr.count("\n") == 1, done.stderr
