"""From the rate and channels of a song to those of a model, and back, block by block."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from local.estimates import name_targets
from local.songs.read import SongReader
from local.tools.command_line import UserError
from local.tools.resample import resample


def read_mixture(blocks: Iterable[np.ndarray], reader: SongReader, rate: int) -> Iterator[Tensor]:
    """Give blocks (T, channels) as a reader reads them two channels (2, T), and `rate` Hz; mono is
    doubled.
    """
    for block in resample(blocks, reader.rate, rate, reader.channels):
        yield torch.from_numpy(np.broadcast_to(block, (len(block), 2)).T.copy())


def restore(
    estimates: Iterable[Tensor], targets: Sequence[str], rate: int, reader: SongReader
) -> Iterator[dict[str, np.ndarray]]:
    """Give the estimates of what `read_mixture` has read the rate, channels and length of the song.

    Args:
        targets: those of the model: see `list_targets`.

    Shape:
        - estimates: (C, 2, T) each, at `rate` Hz
        - output: target -> (channels, T') each

    Raises:
        UserError: an estimate holds NaN or infinity.
    """
    rows, done = (_join_targets(piece, targets, reader.channels) for piece in estimates), 0
    for block in resample(rows, rate, reader.rate, len(targets) * reader.channels):
        block = block[: reader.length - done]
        done += len(block)
        yield _split_targets(block, targets)
    missing = np.zeros((reader.length - done, len(targets) * reader.channels), np.float32)
    yield _split_targets(missing, targets)  # no more than soxr rounds off


def _join_targets(sources: Tensor, targets: Sequence[str], channels: int) -> np.ndarray:
    """(C, 2, T) -> (T, targets * channels)."""
    estimates = name_targets(sources)
    for target, estimate in estimates.items():
        if not np.isfinite(estimate).all():
            raise UserError(f"the estimate of {target} holds NaN or infinity")
    if channels == 1:
        estimates = {name: each.mean(axis=0, keepdims=True) for name, each in estimates.items()}
    return np.concatenate([estimates[target] for target in targets]).T


def _split_targets(rows: np.ndarray, targets: Sequence[str]) -> dict[str, np.ndarray]:
    return dict(zip(targets, np.split(rows.T, len(targets)), strict=True))
