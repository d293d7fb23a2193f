"""Loudness after ITU-R BS.1770-4, of audio that arrives in blocks."""

import math

import numpy as np
from pyloudnorm import IIRfilter
from scipy.signal import lfilter

SHORTEST = 0.4  # seconds of a window; there is no loudness of less
STEP = 0.25  # of a window, to the next
SILENCE, RELATIVE = -70.0, -10.0  # gates in LUFS, and in LU below what passes the first


class LoudnessMeter:
    """Measures what `pyloudnorm.Meter(rate).integrated_loudness` does, with the filters of that
    package, without all samples in memory.

    Args:
        rate: in Hz.
        channels: 1 or 2.
    """

    def __init__(self, rate: int, channels: int):
        self.rate, self.length = rate, 0  # samples so far
        shelf = IIRfilter(4.0, math.sqrt(0.5), 1500.0, rate, "high_shelf")
        self._filters = shelf, IIRfilter(0.0, 0.5, 38.0, rate, "high_pass")
        self._states = [np.zeros((2, channels)) for _ in self._filters]
        self._squares = np.zeros((0, channels))  # from the start of the next window on
        self._energies = []  # of windows

    def add(self, samples: np.ndarray) -> None:
        """Samples (T, channels) that follow."""
        if not len(samples):  # of which lfilter would return another state
            return
        for number, stage in enumerate(self._filters):
            state = self._states[number]
            samples, self._states[number] = lfilter(stage.b, stage.a, samples, axis=0, zi=state)
        self._squares = np.concatenate([self._squares, np.square(samples)])
        self.length += len(samples)
        while self._end(len(self._energies)) <= self.length:
            self._close_window()

    def measure(self) -> float:
        """LUFS; -inf where no window passes the gates, or the audio is shorter than SHORTEST."""
        seconds = self.length / self.rate
        if seconds < SHORTEST:
            return -math.inf
        count = round((seconds - SHORTEST) / (SHORTEST * STEP)) + 1
        while len(self._energies) < count:  # the last one may be cut short by the end
            self._close_window()
        energies = np.array(self._energies[:count])
        loud = energies[_to_lufs(energies) >= SILENCE]
        if len(loud):
            loud = loud[_to_lufs(loud) > max(SILENCE, _to_lufs(loud.mean()) + RELATIVE)]
        return float(_to_lufs(loud.mean())) if len(loud) else -math.inf

    def _start(self, window: int) -> int:
        return int(SHORTEST * (window * STEP) * self.rate)

    def _end(self, window: int) -> int:
        return int(SHORTEST * (window * STEP + 1) * self.rate)

    def _close_window(self) -> None:
        number = len(self._energies)
        start = self._start(number)
        inside = self._squares[: self._end(number) - start]
        self._energies.append(inside.sum() / (SHORTEST * self.rate))
        self._squares = self._squares[self._start(number + 1) - start :]


def _to_lufs(energy):
    with np.errstate(divide="ignore"):
        return -0.691 + 10 * np.log10(energy)
