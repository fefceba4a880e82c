"""Broken if this fails: a place that is taken, a full disk or a signal half way leaves half a folder behind."""

import errno
import json
import os
import resource

import pytest
from transformers.utils import logging

from llava_integration.convert import ConversionError, convert_official, folder
from llava_integration.convert.__main__ import main
from tests.convert import checkpoints as ck
from tests.support.processes import python


@pytest.fixture
def at_every_file(monkeypatch):
    """Calls a function after every file of weights."""

    def install(then):
        save = folder.save_file
        monkeypatch.setattr(folder, "save_file", lambda *args, **options: (save(*args, **options), then()))

    return install


class TestDestination:
    @pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "dangling link"])
    def test_exists(self, refused, src, dst, kind):
        if kind == "dangling link":
            dst.symlink_to("nowhere")
        elif kind == "file":
            dst.write_text("mine")
        else:
            dst.mkdir()
            if kind == "folder":
                (dst / "mine").write_text("mine")
        refused(r"^DST: expected a path where nothing is, got .*which exists", src, dst)
        if kind in ("file", "folder"):
            assert (dst if kind == "file" else dst / "mine").read_text() == "mine"

    def test_appears_meanwhile(self, src, dst, at_every_file):
        at_every_file(lambda: (dst.mkdir(exist_ok=True), (dst / "mine").write_text("mine")))
        with pytest.raises(ConversionError, match="which exists"):
            convert_official(src, dst)
        assert ck.snapshot(dst) == {"mine": b"mine"}

    def test_places_that_do_not_do(self, refused, src, dst, tmp_path):
        refused(r"^DST: expected a place outside", src, src / "stf")
        refused(r"^SRC: expected a local folder, got .*nowhere", tmp_path / "nowhere", dst)
        with pytest.raises(ConversionError, match=r"^DST: expected its parent to be a folder"):
            convert_official(src, tmp_path / "no" / "stf")


class TestDisk:
    def test_full_half_way(self, refused, src, dst):
        """A limit on the size of a file stands in for a disk that is full: the system refuses to write on."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            refused(r"^DST: could not write .*: .*File too large.*; nothing is left there", src, dst)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def test_full_at_the_small_files(self, refused, src, dst, monkeypatch):
        def fail(*_args, **_options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("llava_integration.convert.folder.model_card", fail)
        refused(r"No space left", src, dst)


STOPPED = """
import os, signal, sys
from pathlib import Path
from llava_integration.convert import folder
from llava_integration.convert.__main__ import main, run
def stop(*args, **options):
    save(*args, **options)
    print("half way" if list(Path(sys.argv[4]).parent.glob(".*.partial")) else "nothing is there")
    os.kill(os.getpid(), number)
save, folder.save_file, number = folder.save_file, stop, signal.Signals[sys.argv[1]]
signal.signal(number, signal.default_int_handler if sys.argv[1] == "SIGINT" else signal.SIG_DFL)
run(lambda: main(sys.argv[2:]))
"""


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def restore(self):
        verbosity = logging.get_verbosity()
        yield
        logging.set_verbosity(verbosity)

    def test_report(self, src, dst, capsys):
        assert main(["official", str(src), str(dst), "--dtype", "bfloat16"]) == 0
        out = capsys.readouterr().out
        assert "relaid out: 1" in out
        assert "GB, bfloat16" in out
        assert json.loads((dst / "config.json").read_text())["dtype"] == "bfloat16"

    def test_one_line_and_exit_code_2(self, src, dst):
        dst.mkdir()
        result = python("-m", "llava_integration.convert", "official", str(src), str(dst))
        said = f"python -m llava_integration.convert: error: DST: expected a path where nothing is, got {dst}, which"
        assert (result.returncode, result.stderr) == (2, f"{said} exists; choose another\n")

    @pytest.mark.parametrize(
        "arguments", [[], ["official"], ["llava", "a", "b", "--blocks", "x"], ["official", "a", "b", "--dtype", "int8"]]
    )
    def test_usage(self, arguments):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2

    @pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
    def test_stopped_half_way(self, src, dst, sent, code):
        """The folder beside DST goes then too."""
        beside = set(dst.parent.iterdir())
        result = python("-c", STOPPED, sent, "official", str(src), str(dst))
        assert (result.returncode, result.stdout) == (code, "half way\n")
        assert "Traceback" not in result.stderr
        assert set(dst.parent.iterdir()) == beside
