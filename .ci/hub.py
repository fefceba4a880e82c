"""stf_kernels as the kernels hub keeps it: python .ci/hub.py FOLDER

    FOLDER/README.md                                    its card
    FOLDER/build/torch-universal/metadata.json          name, licence, and an id made of the contents
    FOLDER/build/torch-universal/stf_kernels/...        the package, file by file

`kernels.get_local_kernel(Path(FOLDER))` imports it under its id, and its operators with it, beside an installed one.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "stf_kernels"
VERSION = 1  # of the surface: what get_kernel(..., version=1) asks for
CARD = "---\nlibrary_name: kernels\nlicense: apache-2.0\n---\nFused Triton kernels for LLaVA-STF (arXiv 2506.07138)\n"


def build(folder: Path) -> str:
    """Write the layout to `folder`, which must not exist yet -> its id. Whole or not at all."""
    if folder.exists():
        raise FileExistsError(f"FOLDER: expected one that does not exist yet, got {folder}; remove it or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch, folder.name)
        variant = made / "build" / "torch-universal"
        package = shutil.copytree(PACKAGE, variant / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        digest = hashlib.sha256()
        for path in sorted(path for path in package.rglob("*") if path.is_file()):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
        name = f"_{PACKAGE.name}_{digest.hexdigest()[:12]}"
        about = {"id": name, "name": PACKAGE.name.replace("_", "-"), "version": VERSION, "license": "Apache-2.0"}
        about |= {"python-depends": [], "backend": {"type": "cuda"}}
        (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (made / "README.md").write_text(CARD, encoding="utf-8")
        made.rename(folder)
    return name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        print(f"{build(folder)} -> {folder}")
    except FileExistsError as error:
        parser.error(str(error))
