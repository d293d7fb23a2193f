"""A song on its way to the model: brought to a level, and measured."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from local.lift.loudness import LoudnessMeter
from local.lift.remix import to_gain
from local.songs.read import SongReader
from local.tools.progress import report


class Mixture:
    """A song on its way to the model.

    Attributes:
        gain: which it gets.

    Args:
        keep: what `take` returns is kept until then.
    """

    def __init__(self, reader: SongReader, keep: bool):
        self.gain = 1.0
        self._reader, self._keep = reader, keep
        self._meter = LoudnessMeter(reader.rate, reader.channels)
        self._kept = np.zeros((0, reader.channels), np.float32)

    def read_blocks(self) -> Iterator[np.ndarray]:
        """(T, channels) each."""
        for block in self._reader.read_blocks():
            block = block * np.float32(self.gain)
            self._meter.add(block)
            if self._keep:
                self._kept = np.concatenate([self._kept, block])
            yield block

    def take(self, length: int) -> np.ndarray:
        """(channels, T): the samples that follow those that were taken."""
        taken, self._kept = self._kept[:length], self._kept[length:]
        return taken.T

    @property
    def loudness(self) -> float:
        """In LUFS, at its end."""
        return self._meter.measure()


def measure_song(song: Path) -> float:
    """The loudness of a song in LUFS."""
    reader = SongReader(song)
    meter = LoudnessMeter(reader.rate, reader.channels)
    for block in reader.read_blocks():
        meter.add(block)
    return meter.measure()


def find_gain(loudness: float, lufs: float, title: str) -> float:
    """The gain from one loudness to another; 1 where one of them is none, which is said."""
    change = lufs - loudness
    if math.isfinite(change):
        return to_gain(change)
    report(f"{title}: too quiet or short to have a loudness; its level is left as it is")
    return 1.0
