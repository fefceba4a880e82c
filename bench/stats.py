"""What is said about a list of samples: median and spread, nothing else.

    spread = (p90 - p10) / median        linear interpolation between order statistics, printed in percent

The mean is not used: one descheduled run would move it, and nobody could see that it did.
"""

from __future__ import annotations

from collections.abc import Sequence

# Fewer rounds are judged nowhere. Of two equal rows four rounds call one beyond the noise one time in six, and two runs
# of n rounds lie apart with probability 2 / C(2n, n): 1 in 10 for 3, 1 in 35 for 4.
ENOUGH_ROUNDS = 4


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Order statistic at `fraction` in [0, 1], linearly interpolated."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 0.5)


def spread_percent(samples: Sequence[float]) -> float:
    """(p90 - p10) / median in percent; 0 for a single sample, which says nothing about noise."""
    middle = median(samples)
    return 100 * (percentile(samples, 0.9) - percentile(samples, 0.1)) / middle if middle else 0.0


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times faster `other` is, from samples that were taken side by side, round by round.

    {"ratio": median of baseline[i] / other[i], "low": p10, "high": p90}
    """
    ratios = [a / b for a, b in zip(baseline, other, strict=True)]
    return {"ratio": median(ratios), "low": percentile(ratios, 0.1), "high": percentile(ratios, 0.9)}
