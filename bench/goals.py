"""Where the chain stands in a kernel table: against the goals of an H200, eager and every rival, losses as they are.

forward
time       captured, cold L2, bf16: a first milestone and a goal for each batch
eager      at least 1.03x from batch 8 on, goal 1.08x
rivals     never below 0.98x of the best of them, at any batch
error      against float64, no larger than eager's

forward + backward, tower frozen
time       batch 8 and 32: no slower than eager, goal 1.05x
memory     batch 8: a peak below eager's by at least the bytes of the concatenation and the unfolded copy
"""

from __future__ import annotations

from typing import Any

from .memory import MB
from .problems import LLAVA

DEVICE = "H200"
MICROSECONDS = {1: (190, 155), 2: (320, 270), 4: (560, 490), 8: (1050, 930), 32: (3950, 3600)}  # milestone, goal
EAGER, EAGER_FROM, BEST = 1.03, 8, 0.98
TRAINING, TRAINING_GOAL, MEMORY_FROM = (8, 32), 1.05, 8


def standing(result: dict[str, Any]) -> list[str]:
    """A sentence for each batch and pass of the chain in bf16 whose default path was timed under capture."""
    found = []
    for run in ("forward", "forward+backward"):
        rows = [
            row for row in result["rows"]
            if (row["stage"], row["dtype"], row["pass"]) == ("chain", "bfloat16", run) and row["us"]
        ]  # fmt: skip
        ours = {row["batch"]: row for row in rows if row["provider"] == "stf"}
        for batch in sorted(ours):
            rivals = [r for r in rows if r["batch"] == batch and _is_rival(r)]
            if run == "forward":
                found.append(_sentence(result["device"], ours[batch], rivals))
            else:
                found += _of_training(ours[batch], rivals, result["sizes"] == "llava-1.5-7b")
    return found


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


def _of_training(ours: dict[str, Any], rivals: list[dict[str, Any]], full_size: bool) -> list[str]:
    eager = next((row for row in rivals if row["provider"] == "eager"), None)
    if eager is None:
        return []
    batch, ratio = ours["batch"], eager["us"] / ours["us"]
    words = [f"{ours['us']:.1f} us, {ratio:.2f}x over eager"]
    if batch in TRAINING:
        words.append(f"1.00x {_said(ratio >= 1)}, goal {TRAINING_GOAL}x {_said(ratio >= TRAINING_GOAL)}")
    if full_size and batch >= MEMORY_FROM and eager["peak_mb"] and ours["peak_mb"]:
        saved, avoided = eager["peak_mb"] - ours["peak_mb"], LLAVA.copied_bytes(batch, 2) / MB
        words.append(
            f"peak {ours['peak_mb']:.0f} MB, eager {eager['peak_mb']:.0f}, less by {saved:.0f}; "
            f"concatenation and unfold, {avoided:.0f} MB, {_said(saved >= avoided)}"
        )
    return [f"chain, forward + backward, batch {batch}: " + "; ".join(words)]


def _said(reached: bool) -> str:
    return "reached" if reached else "MISSED"
