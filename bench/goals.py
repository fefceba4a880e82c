"""Where the chain stands in a kernel table: against the goals of an H200, eager and every rival, losses as they are.

time       captured, cold L2, bf16: a first milestone and a goal for each batch
eager      at least 1.03x from batch 8 on, goal 1.08x
rivals     never below 0.98x of the best of them, at any batch
error      against float64, no larger than eager's
"""

from __future__ import annotations

from typing import Any

DEVICE = "H200"
MICROSECONDS = {1: (190, 155), 2: (320, 270), 4: (560, 490), 8: (1050, 930), 32: (3950, 3600)}  # milestone, goal
EAGER, EAGER_FROM, BEST = 1.03, 8, 0.98


def standing(result: dict[str, Any]) -> list[str]:
    """A sentence for each batch of the chain in bf16 whose default path was timed under capture."""
    rows = [
        row for row in result["rows"]
        if (row["stage"], row["dtype"], row["pass"]) == ("chain", "bfloat16", "forward") and row["us"]
    ]  # fmt: skip
    ours = {row["batch"]: row for row in rows if row["provider"] == "stf"}
    return [
        _sentence(result["device"], ours[batch], [r for r in rows if r["batch"] == batch and _is_rival(r)])
        for batch in sorted(ours)
    ]


def _is_rival(row: dict[str, Any]) -> bool:
    return not row["provider"].startswith("stf")


def _sentence(device: str, ours: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    batch, words = ours["batch"], [f"{ours['us']:.1f} us"]
    if DEVICE in device and batch in MICROSECONDS:
        milestone, goal = MICROSECONDS[batch]
        words += [f"milestone {milestone} {_said(ours['us'] <= milestone)}, goal {goal} {_said(ours['us'] <= goal)}"]
    ratios = {row["provider"]: row["us"] / ours["us"] for row in rivals}
    if ratios:
        words.append("over " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in sorted(ratios.items())))
        best = min(ratios, key=ratios.__getitem__)
        words.append(f"{BEST} of the best rival ({best}) {_said(ratios[best] >= BEST)}")
    if "eager" in ratios and batch >= EAGER_FROM:
        words.append(f"{EAGER}x over eager {_said(ratios['eager'] >= EAGER)}")
    for row in rivals:
        if row["provider"] == "eager":
            words.append(f"error no larger than eager's {_said(ours['rel_error'] <= row['rel_error'])}")
    return f"chain, batch {batch}: " + "; ".join(words)


def _said(reached: bool) -> str:
    return "reached" if reached else "MISSED"
