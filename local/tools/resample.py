"""Audio to another sampling rate, block by block."""

from collections.abc import Iterable, Iterator

import numpy as np


def resample(
    blocks: Iterable[np.ndarray], rate: int, new_rate: int, channels: int
) -> Iterator[np.ndarray]:
    """Resample blocks (T, channels) of float32; joined, they equal the resampled whole."""
    if rate == new_rate:
        yield from blocks
        return
    import soxr

    stream = soxr.ResampleStream(rate, new_rate, channels, dtype="float32", quality="VHQ")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True)
