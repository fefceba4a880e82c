"""If this fails, stf_kernels cannot be put on the kernels hub, or its copy kills the process beside this one."""

import json

from support.processes import ROOT, python

# As `kernels` imports a build: the package's __init__.py under the id in its metadata.
BESIDE = """
import importlib.util, json, sys
from pathlib import Path
import torch
import stf_kernels

variant = Path(sys.argv[1], "build", "torch-universal")
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "stf_kernels" / "__init__.py")
copy = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copy)

def f(blocks, weight):
    return [lib.concat_linear(blocks, weight, activation="gelu") for lib in (stf_kernels, copy)]

blocks, weight = [torch.randn(1, 3, 4), torch.randn(1, 3, 4)], torch.randn(5, 8, requires_grad=True)
graphs = []
compiled = torch.compile(f, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
for one, other in (f(blocks, weight), compiled(blocks, weight)):
    gradients = [torch.autograd.grad(y.sum(), weight)[0] for y in (one, other)]
    assert torch.equal(one, other) and torch.equal(*gradients)
called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
assert {"stf_kernels.concat_linear.default", f"{name}.concat_linear.default"} <= called, called
"""


def test_a_build_lives_beside_the_installed_package(tmp_path):
    folder = tmp_path / "new" / "hub"
    built = python(".ci/hub.py", str(folder))
    assert built.returncode == 0, built.stderr
    metadata = json.loads((folder / "build" / "torch-universal" / "metadata.json").read_text())
    assert metadata["id"] in built.stdout
    assert metadata["id"].isidentifier()
    files = {path.relative_to(folder / "build" / "torch-universal") for path in folder.rglob("*.py")}
    assert files == {path.relative_to(ROOT) for path in (ROOT / "stf_kernels").rglob("*.py")}
    result = python("-c", BESIDE, str(folder))
    assert result.returncode == 0, result.stderr[-2000:]

    again = python(".ci/hub.py", str(folder))
    assert again.returncode == 2
    assert "FOLDER: expected one that does not exist yet" in again.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["hub"]
