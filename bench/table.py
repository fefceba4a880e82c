"""A table for a terminal: first columns left, numbers right, nothing else."""

from __future__ import annotations

from collections.abc import Sequence


def render(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 2) -> str:
    """The first `left` columns are text and stand left; the rest stand right."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: expected {len(header)} cells, got {len(row)}: {list(row)}")
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def number(value: float | None, digits: int = 1) -> str:
    """Thousands apart, "-" for what does not exist."""
    return "-" if value is None else f"{value:,.{digits}f}"
