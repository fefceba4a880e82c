"""Ways to launch that are the default only where the device's table has measured them to be faster.

    direct   past the JIT's argument binding (ops/direct_launch.py): host microseconds of the chain's four launches
    pdl      programmatic dependent launches (ops/pdl.py): microseconds of the chain at batch 1, captured, cold L2

A table says so in an optional field: {"launches": {"direct": {"us": ..., "rival_us": ...}, "pdl": {...}}}, rival_us
without it. STF_KERNELS_DIRECT_LAUNCH and STF_KERNELS_PDL, 0 or 1, overrule the table.
"""

import functools
import json
import os
from collections.abc import Mapping

VARIABLES = {"direct": "STF_KERNELS_DIRECT_LAUNCH", "pdl": "STF_KERNELS_PDL"}
_MEASURED = {"us", "rival_us"}


def check_launches(launches: object, arch: str) -> None:
    """ValueError names what of a table's "launches" is unknown, wrong or cannot run on the architecture."""
    if not isinstance(launches, dict) or not launches.keys() <= VARIABLES.keys():
        raise ValueError(f"launches: expected an object with fields of {list(VARIABLES)}, got {launches!r:.200}")
    for name, times in launches.items():
        numbers = isinstance(times, dict) and times.keys() == _MEASURED
        if not numbers or not all(type(us) in (int, float) and us > 0 for us in times.values()):
            raise ValueError(f"launches.{name}: expected positive {sorted(_MEASURED)}, got {times!r:.200}")
    if "pdl" in launches and not has_dependent_launches(arch):
        raise ValueError(f"launches.pdl: dependent launches are for NVIDIA GPUs from sm_90 on, not for {arch}")


def has_dependent_launches(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def is_default(name: str, index: int) -> bool:
    """Whether launches on GPU `index` are made this way: by the environment, else by the device's table."""
    if (said := os.environ.get(VARIABLES[name])) is not None:
        return said == "1"
    return name in _faster(index)


@functools.cache
def _faster(index: int) -> frozenset[str]:
    from .lookup import _table, device_identity, table_path

    slug, arch = device_identity(index)
    if not _table(slug, arch):  # none, or one that was refused
        return frozenset()
    launches: Mapping = json.loads(table_path(slug).read_text(encoding="utf-8")).get("launches", {})
    return frozenset(name for name, times in launches.items() if times["us"] < times["rival_us"])
