"""If this fails, what is installed lacks a file that it needs, or carries what belongs to the checkout alone."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.processes import ROOT, clean_environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made of the sdist, and that of a copy of the checkout with a table of its own: the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    left_out = (".*", "__pycache__", "*.jpg", "results", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    tables = source / "stf_kernels" / "configs" / "tables"
    tables.mkdir(exist_ok=True)
    (tables / "example-device.json").write_text("{}")
    build(source, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})")
    (sdist,) = out.glob("*.tar.gz")
    build(out, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", sdist)
    (path,) = out.glob("*.whl")
    return path


def build(folder, *command):
    result = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"stf_kernels", "llava_integration"}
    assert "stf_kernels/configs/tables/example-device.json" in names
    for package in top:
        assert f"{package}/py.typed" in names
        kept = {".py", ".md", ".jinja", ".txt"}  # templates beside the code that fills them
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.*") if path.suffix in kept}
        assert sources <= names
    assert not any(name.endswith(".pyc") for name in names)
    assert any(name.endswith("LICENSE") for name in names)


def test_it_imports_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import stf_kernels, sys, torch; m = stf_kernels.CompactTokenProjector(2, 4, 5);"
        "print(stf_kernels.__file__, m([torch.zeros(1, 16, 4)] * 2).shape[1], 'reference' in sys.modules)"
    )
    options = {"cwd": tmp_path, "env": clean_environment(PYTHONPATH=str(tmp_path)), "timeout": 300}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    where, tokens, with_reference = result.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert (tokens, with_reference) == ("4", "False")


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(metadata).decode()
    (required,) = [line for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE) if "extra" not in line]
    assert required.startswith("torch")
    extras = set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE))
    assert extras == {"llava", "convert", "train", "bench", "quality", "docs", "dev", "test-quantized"}
    assert "Apache-2.0" in text


def test_a_python_that_is_not_here_is_no_pass(tmp_path):
    """Nor is one of pyenv's shims, which lead nowhere."""
    (shim := tmp_path / "python3.12").write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    environment = clean_environment(PATH=str(tmp_path), PYENV_ROOT=str(tmp_path))
    command = [sys.executable, ROOT / ".ci" / "matrix.py", "3.12", "3.13"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("not available here |") == 2
