"""If this fails, a package imports against the order of its layers; then the comparison, or the wheel, proves nothing.

kernels -> triton;  ops -> kernels, configs;  functional -> ops;  modules -> functional;  reference -> torch and einops.
What a developer runs, tune/ and aot/, stands beside that and is imported by nothing of it.
"""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

import stf_kernels

ROOT = Path(__file__).resolve().parents[2]

# The parts of stf_kernels -> those that each may import beside itself.
MAY_IMPORT = {
    "kernels": [],
    "configs": [],
    "checks": [],
    "relayout": [],
    "backend": ["checks"],
    "linear": ["checks"],
    "ops": ["kernels", "configs", "backend", "checks"],
    "functional": ["ops", "checks", "relayout"],
    "modules": ["functional", "ops", "linear", "checks"],
    "layers": ["modules", "ops", "linear", "checks"],
    "command": [],
    "preparation": ["modules", "ops", "configs", "backend", "checks"],
    "__init__": ["functional", "layers", "modules", "preparation", "backend", "relayout", "command"],
    "tune": ["preparation", "modules", "configs", "backend", "command"],
    "aot": ["ops", "configs", "kernels", "backend", "command"],
}


def imports(path: Path, *, only_at_top=False):
    """(line, absolute dotted name, name it is bound to) of all that a file imports, a `from`'s names one by one."""
    package = path.relative_to(ROOT).parts[:-1]  # of a module and of an __init__ alike
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if only_at_top else ast.walk(tree):
        prefix = ""
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, *([node.module] if node.module else []))) + "."
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, prefix + alias.name, alias.asname or alias.name


def files(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


EACH_FILE = pytest.mark.parametrize("path", files("stf_kernels"), ids=lambda path: str(path.relative_to(ROOT)))


def under(name, *prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def offending(paths, allowed, **options):
    """Imports that `allowed` (a function of the dotted name) refuses, as text."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name, _ in imports(path, **options)
        if not allowed(name)
    ]


@EACH_FILE
def test_parts_of_stf_kernels(path):
    part = path.relative_to(ROOT / "stf_kernels").with_suffix("").parts[0]
    own = [f"stf_kernels.{other}" for other in (part, *MAY_IMPORT[part])]
    others = ["triton"] if part == "kernels" else ["torch", "triton", *sys.stdlib_module_names]
    assert not offending([path], lambda name: under(name, *own, *others))


@EACH_FILE
def test_triton_is_imported_late(path):
    """At the top of a file only in kernels/ and where it is compiled for: the package imports without Triton."""
    found = offending([path], lambda name: not under(name, "triton", "stf_kernels.kernels"), only_at_top=True)
    early = (path.parent.name == "kernels" and path.name != "__init__.py") or path.name == "codegen.py"
    assert bool(found) == early, found


@EACH_FILE
def test_no_private_name_of_another_module(path):
    """Neither imported nor reached through a module; a kernel's name is `_..._kernel` as the field has it."""
    ours = {bound: name for _, name, bound in imports(path) if under(name, "stf_kernels")}
    reached = [
        f"{ours[node.value.id]}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
    ]
    private = [name for name in (*ours.values(), *reached) if re.search(r"\._(?!_)", name)]
    assert all(re.fullmatch(r"stf_kernels\.kernels\.\w+\._\w+_kernel", name) for name in private), private


def test_no_circle_in_stf_kernels():
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files("stf_kernels")}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for _, name, _ in imports(path)} & modules.keys()
        for module, path in modules.items()
    }
    assert "stf_kernels.ops.launch" in graph["stf_kernels.ops.chain"]
    graphlib.TopologicalSorter(graph).prepare()


def test_reference_imports_torch_and_einops_only():
    allowed = ("torch", "einops", "reference", *sys.stdlib_module_names)
    assert not offending(files("reference"), lambda name: under(name, *allowed))


def test_llava_integration_uses_the_public_surface():
    """stf_kernels by its package and how a command ends, and never what is used from the checkout."""
    command = [f"command.{name}" for name in ("BadInput", "STARTED", "carry_on", "lazy", "missing", "run")]
    public = ["stf_kernels", *(f"stf_kernels.{name}" for name in (*stf_kernels.__all__, "command", *command))]
    elsewhere = ("stf_kernels", "reference", "bench", "tests", "support")
    assert not offending(files("llava_integration"), lambda name: name in public or not under(name, *elsewhere))
