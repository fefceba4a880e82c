"""If this fails, a package imports what it must not: then comparing with the reference, or the wheel, proves nothing.

kernels -> triton;  ops -> kernels, configs;  functional -> ops;  modules -> functional;  reference -> torch and einops.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stf_kernels", "reference", "llava_integration")
BACKEND = "stf_kernels.backend"


def imports(path: Path, root: Path = ROOT):
    """(line, absolute dotted name) of everything a file imports, relative ones resolved, a `from`'s names included."""
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), path, root)


def imports_of(tree: ast.AST, path: Path, root: Path = ROOT):
    package = path.relative_to(root).parts[:-1]  # of a module and of an __init__ alike
    for node in ast.walk(tree):
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


def files(where):
    found = sorted((ROOT / where).rglob("*.py")) or [ROOT / where]
    assert found[0].is_file()
    return found


def under(*prefixes):
    return lambda name: any(name == p or name.startswith(p + ".") for p in prefixes)


STANDARD = under(*sys.stdlib_module_names)

# What a folder or file may import beside the standard library.
RULES = {
    "stf_kernels": ("torch", "triton", "stf_kernels"),
    "stf_kernels/configs": ("torch", "stf_kernels.configs"),
    "stf_kernels/ops": ("torch", "triton", "stf_kernels.ops", "stf_kernels.kernels", "stf_kernels.configs", BACKEND),
    "stf_kernels/functional.py": ("torch", "stf_kernels.ops", "stf_kernels.checks", "stf_kernels.relayout"),
    "reference": ("torch", "einops", "reference"),
}


@pytest.mark.parametrize("where", RULES)
def test_imports_point_downwards(where):
    allowed = under(*RULES[where])
    assert not offending(files(where), lambda name: STANDARD(name) or allowed(name))


def test_kernels_import_triton_and_each_other_only():
    assert not offending(files("stf_kernels/kernels"), under("triton", "stf_kernels.kernels"))


def test_run_time_does_not_import_the_workshop():
    """What tunes and compiles ahead is run by a developer; an import of the package must not need it."""
    run_time = [path for path in files("stf_kernels") if path.parent.name not in ("tune", "aot")]
    assert not offending(run_time, lambda name: not under("stf_kernels.tune", "stf_kernels.aot")(name))


@pytest.mark.parametrize("package", PACKAGES)
def test_private_names_stay_in_their_file(package):
    """A kernel's is its name in Triton's cache and profiles, and its launcher's to import."""

    def allowed(name):
        private = name.rsplit(".", 1)[-1].startswith("_") and not name.endswith("__")
        return not private or not under(*PACKAGES)(name) or under("stf_kernels.kernels")(name)

    assert not offending(files(package), allowed)


@pytest.mark.parametrize("path", files("stf_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_triton_is_imported_late(path):
    """At the top of a file only in kernels/ and aot/: the package imports where there is no Triton."""
    if path.parent.name in ("kernels", "aot"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    early = [name for _, name in imports_of(tree, path)]
    assert not [name for name in early if under("triton", "stf_kernels.kernels")(name)]


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
