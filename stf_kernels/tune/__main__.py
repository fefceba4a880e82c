"""python -m stf_kernels.tune: search the configurations of the GPU at hand and write its table.

Every product of the projector of LLaVA-1.5-7B and of an STF alone, inference and training, is selected as at first use
(configs/selection.py), from every tile. An interrupted search goes on where it stopped.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from ..command import run

DTYPES = ("float16", "bfloat16", "float32")
SIZES: dict[str, Any] = {"dim": 1024, "out_dim": 4096}
PLACE = "cuda"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stf_kernels.tune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="images")
    parser.add_argument("--most", type=int, default=24, help="configurations to measure of each product")
    parser.add_argument("--out", type=Path, help="default: the package's own table of this device")
    parser.add_argument("--commit", default="unknown", help="the commit that is measured, for the record")
    options = parser.parse_args(argv)
    if min(options.batch) < 1 or options.most < 1:
        parser.error(f"--batch, --most: expected at least 1, got {options.batch}, {options.most}")
    os.environ["STF_KERNELS_SELECT"] = "first_use"
    import torch
    from torch import nn

    from ..backend import triton_serves, use_backend
    from ..configs import GemmConfig, device_identity, selection
    from ..configs.model import every_tile
    from ..configs.tables import Table, table_path, versions
    from ..modules import CompactTokenProjector, SpatialTokenFusion
    from ..preparation import prepare

    if not torch.cuda.is_available() or not triton_serves(torch.device("cuda", torch.cuda.current_device())):
        parser.error("this command measures, and there is no GPU here that Triton serves; the model serves without")
    slug, arch = device_identity(torch.cuda.current_device())
    table = Table(options.out or table_path(slug), slug, arch, versions() | {"commit": options.commit}).read()
    selection.search = selection.Search(every_tile, GemmConfig.tile, 2, options.most, 60, table)
    for name in options.dtype:
        placed: dict[str, Any] = {"dtype": getattr(torch, name), "device": PLACE}
        projector = CompactTokenProjector(8, **SIZES, skip_tokens=1, **placed)
        modules = nn.ModuleDict({"projector": projector, "stf": SpatialTokenFusion(**SIZES, **placed)})
        with use_backend("auto"):
            for training in (False, True):
                print(prepare(modules, batch_sizes=sorted(options.batch), training=training), flush=True)
    print(f"{len(table.known)} entries in {table.path}")
    return 0 if table.path.exists() else 1


if __name__ == "__main__":
    run(main)
