"""A remix of a song in two passes: measured, then made at the right level."""

import math
from collections.abc import Iterator

import numpy as np

from local.lift.listener import Listener
from local.lift.loudness import LoudnessMeter
from local.lift.mixture import find_gain
from local.lift.remix import FULL_SCALE, find_peak, mix
from local.lift.spool import Spool
from local.tools.progress import report

LEAST_SAID = 0.01  # dB


class Remixer:
    """The remix of a song at an alpha.

    Args:
        title: of the song, for what is said of the remix.
        rate, channels: of the song.
        listener: for whom it is compressed at the end, which needs all of it in memory.
        clip: whether it is clipped beyond full scale, and not turned down.
    """

    def __init__(
        self,
        alpha: float,
        title: str,
        rate: int,
        channels: int,
        listener: Listener | None = None,
        clip: bool = False,
    ):
        self._alpha, self._rate, self._listener, self._clip = alpha, rate, listener, clip
        self._title = f"{title}: alpha {alpha:g}"
        self._meter, self._peak, self._gain = LoudnessMeter(rate, channels), 0.0, 1.0

    def measure(self, vocals: np.ndarray, accompaniment: np.ndarray) -> None:
        """Blocks (channels, T) that follow."""
        remix = mix(vocals, accompaniment, self._alpha)
        self._meter.add(remix.T)
        self._peak = max(self._peak, find_peak(remix))

    def level(self, lufs: float) -> None:
        """Bring what was measured to a loudness."""
        self._gain = find_gain(self._meter.measure(), lufs, self._title)

    def make(self, spool: Spool) -> Iterator[np.ndarray]:
        """Blocks (channels, T), within full scale; of the two channels of a listener's ears."""
        blocks = (self._gain * mix(*pair, self._alpha) for pair in spool.read())
        peak = self._gain * self._peak
        if self._listener:
            whole = np.concatenate(list(blocks), axis=-1)
            blocks = [self._listener.compress(whole, self._rate)]
            peak = find_peak(blocks[0])
        excess = max(1.0, peak)
        decibels = 20 * math.log10(excess)
        if decibels >= LEAST_SAID:
            done = "clipped, by up to" if self._clip else "turned down by"
            report(f"{self._title}: {done} {decibels:.2f} dB, to full scale")
        for block in blocks:
            yield block.clip(-1, FULL_SCALE) if self._clip else block / excess
