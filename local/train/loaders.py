"""The loaders of a run: which items and tracks a rank sees, in which order."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from local.musdb18_dataset import SegmentDataset, TrackDataset, keep_batch
from local.train.ranks import find_rank


def make_loaders(
    conf: dict, train_set: SegmentDataset, valid_set: TrackDataset
) -> tuple[DataLoader, DataLoader]:
    """(segments in batches, tracks one by one)."""
    training = conf["training"]
    shared = dict(
        num_workers=training["num_workers"],
        persistent_workers=training["num_workers"] > 0,
        pin_memory=torch.cuda.is_available() and training["accelerator"] != "cpu",
    )
    train_loader = DataLoader(
        train_set,
        batch_size=training["batch_size"],
        sampler=EpochSampler(len(train_set), training["seed"]),
        collate_fn=keep_batch,
        drop_last=True,
        **shared,
    )
    return train_loader, DataLoader(valid_set, sampler=RankSampler(len(valid_set)), **shared)


def count_batches(conf: dict, items: int, ranks: int) -> int:
    """The batches of each rank in an epoch of so many items over all ranks."""
    return items // ranks // conf["training"]["batch_size"]


class EpochSampler(Sampler):
    """Yields the (epoch, index) pairs of this rank; all items are shuffled again in every epoch.

    The epoch comes with the index because persistent workers would not learn of it otherwise.
    Ranks get equally many items, so an epoch may lack up to ranks - 1 items.
    """

    def __init__(self, items: int, seed: int = 0):
        self.items, self.seed, self.epoch, self.start = items, seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, start: int) -> None:
        """Skips the first `start` pairs of this rank in an epoch."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.items // find_rank()[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, ranks = find_rank()
        for index in self._order()[rank : len(self) * ranks : ranks][self.start :]:
            yield self.epoch, int(index)

    def find_items(self, start: int, stop: int) -> list[int]:
        """The indices that all ranks see while each yields its pairs from `start` to `stop`."""
        _, ranks = find_rank()
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
        rank, ranks = find_rank()
        return range(rank, self.items, ranks)
