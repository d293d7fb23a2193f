"""The loaders of a run: which items and tracks a rank sees, in which order."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import disk_usage

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from local.musdb18_dataset import SegmentDataset, TrackDataset, keep_batch
from local.train.ranks import find_rank

WAITING_BATCHES = 2  # per worker
SHARED_MEMORY = Path("/dev/shm")  # through which workers send batches
LARGER_SHARED_MEMORY = (
    "--num_workers 0 needs none, fewer need less; docker run --shm-size enlarges it"
)


def make_loaders(
    conf: dict, train_set: SegmentDataset, valid_set: TrackDataset
) -> tuple[DataLoader, TrackLoader]:
    """(segments in batches, tracks one by one)."""
    training, workers = conf["training"], conf["training"]["num_workers"]
    pin_memory = torch.cuda.is_available() and training["accelerator"] != "cpu"
    train_loader = DataLoader(
        train_set,
        batch_size=training["batch_size"],
        sampler=EpochSampler(len(train_set), training["seed"]),
        collate_fn=keep_batch,
        drop_last=True,
        num_workers=workers,
        prefetch_factor=WAITING_BATCHES if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )
    return train_loader, TrackLoader(valid_set, workers, pin_memory)


def find_shared_memory_faults(conf: dict, processes: int) -> list[str]:
    """Whether the batches that workers have read would not fit into shared memory, a line or none.

    Args:
        processes: of the run on this machine, each with its own workers.
    """
    training, data = conf["training"], conf["data"]
    flag = f"--num_workers {training['num_workers']}"
    if training["num_workers"] == 0 or sys.platform != "linux":
        return []
    if not os.access(SHARED_MEMORY, os.W_OK):
        return [f"{flag}: workers need {SHARED_MEMORY}, which cannot be written; use 0"]
    signals = 3 if data["mix_background"] else 5  # the mixture and its targets
    item_bytes = signals * 2 * int(data["segment"] * data["sample_rate"]) * 4
    batches = processes * (WAITING_BATCHES * training["num_workers"] + 1)
    needed, free = batches * training["batch_size"] * item_bytes, disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return []
    return [
        f"{flag}: the batches that workers read ahead take"
        f" {needed / 1e6:,.1f} MB of shared memory, and {free / 1e6:,.1f} MB are free in"
        f" {SHARED_MEMORY}; {LARGER_SHARED_MEMORY}"
    ]


class TrackLoader(DataLoader):
    """Yields this rank's share of the tracks in order, as batches of one, read ahead by threads.

    Worker processes would send them through shared memory: 250 MB for 4 minutes.

    Args:
        readers: threads, and tracks that are read ahead; with 0, a track is read when it is due.
    """

    def __init__(self, dataset: TrackDataset, readers: int, pin_memory: bool = False):
        super().__init__(dataset, sampler=RankSampler(len(dataset)), pin_memory=pin_memory)
        self.readers = readers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.readers == 0:
            yield from map(self._read, self.sampler)
            return
        pool, tracks = ThreadPoolExecutor(self.readers), deque()
        try:
            for index in self.sampler:
                tracks.append(pool.submit(self._read, index))
                if len(tracks) > self.readers:
                    yield tracks.popleft().result()
            while tracks:
                yield tracks.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        mixture, targets = (part[None] for part in self.dataset[index])
        if self.pin_memory:
            return mixture.pin_memory(), targets.pin_memory()
        return mixture, targets


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
