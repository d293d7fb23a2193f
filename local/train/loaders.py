"""The loaders of a run: which items and tracks each rank sees, in which order."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """Yields this rank's (epoch, index) pairs, all items shuffled anew every epoch.

    The epoch travels with the index because workers that live on would not hear of it otherwise.
    Ranks get equally many items, so up to ranks - 1 items are left out of an epoch.
    """

    def __init__(self, items: int, seed: int = 0):
        self.items, self.seed, self.epoch, self.start = items, seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def go_on(self, epoch: int, start: int) -> None:
        """Leaves out the first `start` pairs of this rank in an epoch, which were seen before."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.items // _rank_and_ranks()[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, ranks = _rank_and_ranks()
        for index in self._order()[rank : len(self) * ranks : ranks][self.start :]:
            yield self.epoch, int(index)

    def find_items(self, start: int, stop: int) -> list[int]:
        """The indices that all ranks see while each yields its pairs from `start` to `stop`."""
        _, ranks = _rank_and_ranks()
        return self._order()[start * ranks : stop * ranks].tolist()

    def _order(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.items)


class RankSampler(Sampler):
    """Yields this rank's share of the indices in order, each index on one rank only."""

    def __init__(self, items: int):
        self.items = items

    def __len__(self) -> int:
        return len(self._share())

    def __iter__(self) -> Iterator[int]:
        yield from self._share()

    def _share(self) -> range:
        rank, ranks = _rank_and_ranks()
        return range(rank, self.items, ranks)


def _rank_and_ranks() -> tuple[int, int]:
    # Asked when needed: samplers are made before Lightning starts the process group.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def count_batches(conf: dict, items: int, ranks: int) -> int:
    """The batches that each rank trains on in an epoch of so many items over all of them."""
    return items // ranks // conf["training"]["batch_size"]
