"""What is said about samples: their median, their spread, and of two series taken side by side the ratio.

No mean: one descheduled run would move it, and nobody could see that it did.
"""

from collections.abc import Sequence
from statistics import median

import numpy

# Fewer rounds are judged nowhere: of two equal rows even four call one beyond the noise one time in six.
ENOUGH_ROUNDS = 4


def low_high(samples: Sequence[float]) -> tuple[float, float]:
    """p10 and p90."""
    low, high = numpy.percentile(samples, (10, 90))
    return float(low), float(high)


def spread_percent(samples: Sequence[float]) -> float:
    """0 for a single sample, which says nothing about noise."""
    low, high = low_high(samples)
    return 100 * (high - low) / median(samples)


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times faster `other` is, round by round, so that drift of the machine cancels."""
    ratios = [a / b for a, b in zip(baseline, other, strict=True)]
    low, high = low_high(ratios)
    return {"ratio": median(ratios), "low": low, "high": high}
