"""If this fails, a package imports what DESIGN section 6 forbids; then the comparison, or the wheel, proves nothing.

kernels -> triton;  ops -> kernels, tuning;  functional -> ops;  modules -> functional;  reference -> torch and einops.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stf_kernels", "reference", "llava_integration")


def imports(path: Path, root: Path = ROOT):
    """(line, absolute dotted name) of everything a file imports, relative ones resolved, a `from`'s names included."""
    package = path.relative_to(root).with_suffix("").parts
    package = package[:-1]  # of a module and of an __init__ alike
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            prefix = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def offending(files, allowed):
    """Imports that `allowed` (a function of the dotted name) refuses, as text."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if not allowed(name)
    ]


def files(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def under(*prefixes):
    return lambda name: any(name == p or name.startswith(p + ".") for p in prefixes)


STANDARD = under(*sys.stdlib_module_names)


def test_kernels_import_triton_and_each_other_only():
    allowed = under("triton", "stf_kernels.kernels")
    assert not offending(files("stf_kernels/kernels"), allowed)


def test_ops_import_kernels_tuning_and_the_backend():
    mine = under("stf_kernels.ops", "stf_kernels.kernels", "stf_kernels.tuning", "stf_kernels.backend")
    assert not offending(files("stf_kernels/ops"), lambda n: STANDARD(n) or under("torch", "triton")(n) or mine(n))


def test_tuning_does_not_import_what_the_user_calls():
    """The search may use the launcher; the look-up, which every call goes through, may not import upwards."""
    upwards = under("stf_kernels.functional", "stf_kernels.modules")
    assert not offending(files("stf_kernels/tuning"), lambda n: not upwards(n))
    lookup = [path for path in files("stf_kernels/tuning") if path.stem in ("config", "heuristic", "lookup")]
    assert len(lookup) == 3
    assert not offending(lookup, lambda n: STANDARD(n) or under("torch", "stf_kernels.tuning")(n))


def test_functional_does_not_import_modules():
    assert not offending([ROOT / "stf_kernels/functional.py"], lambda n: not under("stf_kernels.modules")(n))


@pytest.mark.parametrize("path", files("stf_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_stf_kernels_stands_alone(path):
    allowed = lambda n: STANDARD(n) or under("torch", "triton", "stf_kernels")(n)  # noqa: E731
    assert not offending([path], allowed)


@pytest.mark.parametrize("path", files("stf_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_triton_is_imported_late(path):
    """At the top of a file only in kernels/ : the package imports where there is no Triton."""
    if path.parent.name == "kernels" or path.name in ("aot.py", "codegen.py"):  # `python -m stf_kernels.aot` itself
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [node.module or ""]
                if not node.level
                else [f".{node.module or ''}"] + [f".{a.name}" for a in node.names]
            )
        assert not any(n.split(".")[0] == "triton" or "kernels" in n.strip(".").split(".") for n in names), names


def test_reference_imports_torch_and_einops_only():
    assert not offending(files("reference"), lambda n: STANDARD(n) or under("torch", "einops", "reference")(n))


def test_llava_integration_uses_the_public_surface():
    """stf_kernels by its package alone, and never what is used from the checkout."""

    def allowed(name):
        if under("stf_kernels")(name):
            return name.count(".") <= 1
        return not under("reference", "bench", "tests")(name)

    assert not offending(files("llava_integration"), allowed)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_bench_or_tests(package):
    assert not offending(files(package), lambda n: not under("bench", "tests", "support")(n))


def test_the_parser_sees_relative_imports(tmp_path):
    """Else every test above could pass on nothing."""
    folder = tmp_path / "stf_kernels" / "kernels"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from ..ops import launch\nfrom . import b\nimport torch\nfrom .b import c\n")
    names = [name for _, name in imports(folder / "a.py", tmp_path)]
    assert names == ["stf_kernels.ops.launch", "stf_kernels.kernels.b", "torch", "stf_kernels.kernels.b.c"]
