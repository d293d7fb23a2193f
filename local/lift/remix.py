"""Vocals and accompaniment joined again, with the vocals lifted."""

import numpy as np

from local.lift.loudness import LoudnessMeter


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


class Remix:
    """The remix of a song at an alpha: measured block by block first, and made by a gain then.

    Attributes:
        gain: of the remix, 1 at first.
    """

    def __init__(self, alpha: float, rate: int, channels: int):
        self.alpha, self.gain = alpha, 1.0
        self._meter, self._peak = LoudnessMeter(rate, channels), 0.0

    def make(self, vocals: np.ndarray, accompaniment: np.ndarray) -> np.ndarray:
        """(channels, T) each."""
        return self.gain * mix(vocals, accompaniment, self.alpha)

    def measure(self, vocals: np.ndarray, accompaniment: np.ndarray) -> None:
        """As `make`, of all blocks, before the gain is set."""
        remix = self.make(vocals, accompaniment)
        self._meter.add(remix.T)
        self._peak = max(self._peak, find_peak(remix))

    @property
    def loudness(self) -> float:
        """In LUFS, of what was measured."""
        return self._meter.measure()

    @property
    def peak(self) -> float:
        """The greatest sample, with the gain."""
        return self.gain * self._peak


def find_peak(samples: np.ndarray) -> float:
    return float(np.abs(samples).max(initial=0.0))
