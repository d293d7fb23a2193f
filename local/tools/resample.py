"""Audio to another sampling rate, block by block."""

from collections.abc import Iterable, Iterator

import numpy as np


class Resampler:
    """Resample blocks (T, channels) to float32; joined, they equal the resampled whole."""

    def __init__(self, rate: int, new_rate: int, channels: int):
        self.channels, self.stream = channels, None
        if rate != new_rate:
            import soxr

            form = {"dtype": "float32", "quality": "VHQ"}
            self.stream = soxr.ResampleStream(rate, new_rate, channels, **form)

    def push(self, block: np.ndarray) -> np.ndarray:
        """Take the next block, and return what is ready; at the same rate the block itself."""
        if self.stream is None:
            return block
        return self.stream.resample_chunk(np.ascontiguousarray(block, np.float32))

    def flush(self) -> np.ndarray:
        """Return the rest."""
        nothing = np.zeros((0, self.channels), np.float32)
        return nothing if self.stream is None else self.stream.resample_chunk(nothing, last=True)


def resample(
    blocks: Iterable[np.ndarray], rate: int, new_rate: int, channels: int
) -> Iterator[np.ndarray]:
    """Resample blocks (T, channels) of float32; joined, they equal the resampled whole."""
    resampler = Resampler(rate, new_rate, channels)
    for block in blocks:
        yield resampler.push(block)
    if rate != new_rate:
        yield resampler.flush()
