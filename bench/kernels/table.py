"""The kernel table as text, for the terminal and for the page: losses as they are."""

from collections.abc import Iterator
from typing import Any

from ..command import number, table


def ratios(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float | None, float | None]]:
    """Each row with its time, captured where it could be, and how many times faster than eager it is."""

    def key(row: dict[str, Any]) -> tuple:
        return row["pass"], row["stage"], row["batch"], row["dtype"]

    eager = {key(row): row["us"] or row["us_eager"] for row in rows if row["provider"] == "eager"}
    for row in rows:
        own, base = row["us"] or row["us_eager"], eager.get(key(row))
        yield row, own, base / own if own and base else None


def cells(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Column -> what it says, for every row."""
    found = []
    for row, own, ratio in ratios(rows):
        said = {name: str(row[name]) for name in ("stage", "provider", "pass", "dtype", "batch")}
        said |= {"us": number(row["us"]), "us eager": number(row["us_eager"]), "floor us": number(row["floor_us"])}
        said |= {"us / floor": number(own and own / row["floor_us"], 2), "vs eager": f"{ratio:.2f}x" if ratio else "-"}
        said |= {"peak MB": number(row["peak_mb"])}
        said |= {"error": "-" if row["rel_error"] is None else f"{row['rel_error']:.1e}"}
        found.append(said | {"remark": row["failed"] or ""})
    return found


def standing(rows: list[dict[str, Any]]) -> list[str]:
    """How the default path of the chain stands against eager and against the best of its rivals."""
    chains: dict[tuple, dict[str, float]] = {}
    for row, own, _ in ratios(rows):
        if own and row["stage"] == "chain":
            chains.setdefault((row["pass"], row["batch"], row["dtype"]), {})[row["provider"]] = own
    said = []
    for (run, batch, dtype), times in chains.items():
        rivals = {name: time / times["stf"] for name, time in times.items() if "stf" in times and name[:3] != "stf"}
        if rivals:
            best = min(rivals, key=rivals.__getitem__)
            eager = f"{rivals['eager']:.2f}x over eager, " if "eager" in rivals else ""
            figures = f"{times['stf']:.1f} us, {eager}{rivals[best]:.2f}x over the best rival, {best}"
            said.append(f"chain {run}, batch {batch}, {dtype}: {figures}")
    return said


def report(result: dict[str, Any]) -> str:
    head = "{device}   torch {torch}, triton {triton}, commit {commit:.12}".format(**result)
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join([head, "", table(cells(result["rows"]), left=4), *standing(result["rows"]), *notes])
