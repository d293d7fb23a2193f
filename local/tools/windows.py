"""A track that arrives in blocks, cut into windows, and these in batches."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def cut_windows(
    blocks: Iterable[Tensor], hop: int, shared: int = 0
) -> Iterator[tuple[Tensor, bool]]:
    """Cuts a track into windows that end every `hop` samples.

    Args:
        shared: samples of a window that the one before has, too.

    Yields:
        (window, whether it is the last). The last one has what remains.
    """
    rest, size = None, hop
    for block in blocks:
        rest = block if rest is None else torch.cat([rest, block], dim=-1)
        while rest.shape[-1] > size:
            yield rest[:, :size], False
            rest, size = rest[:, size - shared :], hop + shared
    if rest is not None:
        yield rest, True


def batch_windows(
    windows: Iterable[tuple[Tensor, bool]], most: int
) -> Iterator[tuple[Tensor, bool]]:
    """Batches of up to `most` consecutive windows of one length: gLN would average over padding.

    Yields:
        (windows, whether they are the last).
    """
    batch = []
    for window, is_last in windows:
        if batch and (len(batch) == most or batch[0].shape != window.shape):
            yield torch.stack(batch), False
            batch = []
        batch.append(window)
        if is_last:
            yield torch.stack(batch), True
