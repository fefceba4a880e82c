"""The shape that a JSON value must have, and the first place where one has another.

str, int, bool, list, dict   of that type; bool is no int
float                        a finite number         Above(0) a finite number above 0
None                         null                    (a, b) either of them
[a]                          a list of a             {...: a} an object of a under any name
{"name": a, "name?": b}      an object with these fields and perhaps others; `name?` may be missing, not wrong
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HUGE = 1e300  # JSON has integers that no float holds


@dataclass(frozen=True)
class Above:
    """A finite number above `least`."""

    least: float


def problem(value: Any, shape: Any, name: str) -> str | None:
    """`name: expected ..., got ...` of the first difference in `value`, None where there is none."""
    if isinstance(shape, tuple):
        found = [problem(value, each, name) for each in shape]
        return None if None in found else f"{name}: expected {' or '.join(map(_said, shape))}, got {_short(value)}"
    if isinstance(shape, list):
        inside = [(f"{name}[{i}]", each, shape[0]) for i, each in enumerate(value)] if isinstance(value, list) else None
    elif isinstance(shape, dict):
        inside = _fields(value, shape, name) if isinstance(value, dict) else None
    else:
        inside = [] if _fits(value, shape) else None
    if inside is None:
        return f"{name}: expected {_said(shape)}, got {_short(value)}"
    for place, each, expected in inside:
        if expected is _Missing:
            return f"{place}: missing"
        if found_inside := problem(each, expected, place):
            return found_inside
    return None


class _Missing:
    """The shape of a field that is not there."""


def _fields(value: dict[str, Any], shape: dict[Any, Any], name: str) -> list[tuple[str, Any, Any]]:
    if ... in shape:
        return [(f"{name}: {field}", each, shape[...]) for field, each in value.items()]
    inside = []
    for field, expected in shape.items():
        plain = field.removesuffix("?")
        if plain in value:
            inside.append((f"{name}: {plain}", value[plain], expected))
        elif plain == field:
            inside.append((f"{name}: {plain}", None, _Missing))
    return inside


def _fits(value: Any, shape: Any) -> bool:
    if shape is None:
        return value is None
    if shape is bool or not isinstance(value, bool):
        if shape is float or isinstance(shape, Above):
            least = shape.least if isinstance(shape, Above) else -HUGE
            return isinstance(value, (int, float)) and least < value < HUGE
        return isinstance(value, shape)
    return False


def _said(shape: Any) -> str:
    if shape is None:
        return "null"
    if isinstance(shape, Above):
        return f"a number above {shape.least:g}"
    if isinstance(shape, dict):
        return "an object"
    return "list" if isinstance(shape, list) else shape.__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
