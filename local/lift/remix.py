"""Vocals and accompaniment joined again, with the vocals lifted."""

import numpy as np

FULL_SCALE = 1 - 2**-15  # the greatest sample of 16 bits


def mix(vocals: np.ndarray, accompaniment: np.ndarray, alpha: float) -> np.ndarray:
    """The remix of the Second Cadenza Challenge: at 0 both as they are, at 1 the vocals alone,
    doubled.

    Args:
        alpha: from 0 to 1.

    Shape:
        - all: (..., T)
    """
    return vocals * (1 + alpha**2) + accompaniment * (1 - alpha**2)


def to_gain(decibels: float) -> float:
    return 10 ** (decibels / 20)


def find_peak(samples: np.ndarray) -> float:
    """The greatest sample, relative to full scale: -1 to FULL_SCALE."""
    return float(max(samples.max(initial=0.0) / FULL_SCALE, -samples.min(initial=0.0)))
