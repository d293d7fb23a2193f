"""MUSDB18 as data sets: random training segments with augmentation, and whole tracks.

The augmentation is that of Uhlich et al., "Improving music source separation based on deep neural
networks through data augmentation and network blending" (ICASSP 2017): stems of random tracks,
random gains, and random swaps of the channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from mmap import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from local.musdb18_tracks import SOURCES, DatasetError, Track
from local.tools.command_line import plural
from local.tracks.track import raise_dataset_faults

STEMS = (*SOURCES, "accompaniment")  # of four-stem tracks, and the background of karaoke pairs
MOST_WORKERS = 32  # of a loader; with more, some share a row of Reading


class Reading:
    """The file that each worker of a loader is reading, in memory that outlives the worker.

    Forked workers share it. What spawned ones record is not known to others.
    """

    def __init__(self):
        self._rows = np.frombuffer(mmap(-1, MOST_WORKERS * 24), np.int64).reshape(-1, 3)

    def __reduce__(self):
        return Reading, ()

    def note(self, track: int, stem: int) -> None:
        """Records what a worker is about to read; does nothing outside of workers."""
        if (worker := get_worker_info()) is not None:
            self._rows[worker.id % MOST_WORKERS] = os.getpid(), track, stem

    def find(self, pid: int) -> tuple[int, int] | None:
        """The last (track, stem of STEMS) that the worker with this process id has recorded."""
        for owner, track, stem in self._rows.tolist():
            if owner == pid:
                return track, stem
        return None


class SegmentDataset(Dataset):
    """Random segments with augmentation.

    An item is a pure function of (seed, epoch, index), so it is the same for any number of
    workers, on any rank and after resuming. The dataset is indexed by (epoch, index); an index
    alone means epoch 0. A DataLoader is fastest with collate_fn=keep_batch.

    Args:
        tracks: the training tracks.
        length: samples in a segment.
        samples_per_track: an epoch has len(tracks) * samples_per_track items.
        mix_background: whether the targets are vocals and the sum of the others, or all of SOURCES.
        seed: of the random segments.
        mix_tracks: whether every stem of an item comes from a random track and place of its own;
            else all are from one.
        gains: the least and the largest gain of a stem.
        swap: the probability that the channels of a stem are swapped.

    Raises:
        DatasetError: lists the tracks that are shorter than a segment; or there are karaoke pairs,
            and mix_background is off.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        length: int,
        samples_per_track: int = 64,
        mix_background: bool = True,
        seed: int = 0,
        mix_tracks: bool = True,
        gains: tuple[float, float] = (0.25, 1.25),
        swap: float = 0.5,
    ):
        _refuse_pairs(tracks, mix_background)
        _refuse_short(tracks, length)
        self.tracks, self.length, self.samples_per_track = tracks, length, samples_per_track
        self.mix_background, self.seed = mix_background, seed
        self.mix_tracks, self.gains, self.swap = mix_tracks, gains, swap
        self.holders = {
            stem: [number for number, track in enumerate(tracks) if stem in track.stems]
            for stem in STEMS
        }
        self.reading = Reading()

    def __len__(self) -> int:
        return len(self.tracks) * self.samples_per_track

    def __getitem__(self, position: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        """The item at (epoch, index).

        Shape:
            - mixture: (2, length), the sum of the targets
            - targets: (targets, 2, length)
        """
        (item,) = self.__getitems__([position])
        return item

    def __getitems__(self, positions: Sequence[tuple[int, int] | int]) -> SegmentBatch:
        """The items at M positions, as a DataLoader asks for a batch."""
        mixtures, targets = _allocate(self.mix_background, self.length, len(positions))
        if get_worker_info() is not None:
            # Workers send batches through shared memory; allocated there, they need no copy.
            mixtures.share_memory_()
            targets.share_memory_()
        batch = SegmentBatch(mixtures, targets)
        for position, item in zip(positions, batch, strict=True):
            if not isinstance(position, tuple):
                position = 0, range(len(self))[position]  # an IndexError ends a for loop
            rng = np.random.default_rng((self.seed, *position))
            mix_targets(self.draw_stems(rng), *item)
        return batch

    def draw_stems(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.float32]]:
        """The stems of an item: vocals, and either bass, drums and other, or the background of a
        karaoke pair, as often as there are such tracks: see `draw_stem`.
        """
        if not self.mix_tracks:
            place = self.draw_place(range(len(self.tracks)), rng)
            sources = self.tracks[place[0]].sources
            yield from (self.draw_stem(source, rng, place) for source in sources)
            return
        yield self.draw_stem("vocals", rng)
        pairs = len(self.holders["accompaniment"])
        if pairs and rng.integers(len(self.tracks)) < pairs:
            yield self.draw_stem("accompaniment", rng)
        else:
            yield from (self.draw_stem(source, rng) for source in SOURCES[1:])

    def draw_place(self, numbers: Sequence[int], rng: np.random.Generator) -> tuple[int, int]:
        """(number of one of some tracks, first sample of a segment in it)."""
        number = numbers[rng.integers(len(numbers))]
        return number, int(rng.integers(self.tracks[number].length - self.length + 1))

    def draw_stem(
        self, source: str, rng: np.random.Generator, place: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.float32]:
        """(samples of a segment, (2, length); what to multiply them by), augmented.

        Args:
            place: as of `draw_place`; None for one of its own.
        """
        number, start = place or self.draw_place(self.holders[source], rng)
        self.reading.note(number, STEMS.index(source))
        track = self.tracks[number]
        gain = np.float32(rng.uniform(*self.gains))
        swap = rng.random() < self.swap
        samples, unit = track.read_samples(source, start, self.length)
        return (samples[::-1] if swap else samples), gain * unit


class SegmentBatch(list):
    """M items (mixture, targets), as a collate function takes them: views of two tensors.

    Shape:
        - mixtures: (M, 2, length), the sums of the targets
        - targets: (M, targets, 2, length)
    """

    def __init__(self, mixtures: Tensor, targets: Tensor):
        super().__init__(zip(mixtures, targets, strict=True))
        self.mixtures, self.targets = mixtures, targets


def keep_batch(batch: SegmentBatch) -> tuple[Tensor, Tensor]:
    """The collate function for SegmentDataset: (mixtures, targets) without a copy."""
    return batch.mixtures, batch.targets


class TrackDataset(Dataset):
    """Whole tracks without augmentation: (mixture, targets) as in SegmentDataset."""

    def __init__(self, tracks: Sequence[Track], mix_background: bool = True):
        _refuse_pairs(tracks, mix_background)
        self.tracks, self.mix_background = tracks, mix_background

    def __len__(self) -> int:
        return len(self.tracks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        track = self.tracks[index]
        mixture, targets = _allocate(self.mix_background, track.length)
        mix_targets(map(track.read_samples, track.sources), mixture, targets)
        return mixture, targets


def _refuse_pairs(tracks: Sequence[Track], mix_background: bool) -> None:
    pairs = [track.name for track in tracks if track.is_pair]
    if pairs and not mix_background:
        raise DatasetError(
            f"--mix_background no: {plural(len(pairs), 'track')} without bass, drums and other"
            f" ({pairs[0]}); use --mix_background yes, or remove them"
        )


def _refuse_short(tracks: Sequence[Track], length: int) -> None:
    faults: dict[Path, list[str]] = {}
    for track in tracks:
        if track.length < length:
            faults.setdefault(track.place.root, []).append(
                f"{track.place}: {track.seconds:.2f} s, shorter than"
                f" --segment {length / track.rate:g}"
            )
    raise_dataset_faults(faults)


def _allocate(mix_background: bool, length: int, *batch: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (mixture, targets) for mix_targets, with the dimensions of a batch first."""
    count = 2 if mix_background else len(SOURCES)
    return (
        torch.empty(*batch, 2, length, dtype=torch.float32),
        torch.empty(*batch, count, 2, length, dtype=torch.float32),
    )


def mix_targets(
    stems: Iterable[tuple[np.ndarray, np.float32]], mixture: Tensor, targets: Tensor
) -> None:
    """Writes the stems to the targets and their sum to the mixture.

    Args:
        stems: pairs (samples, gain) in the order of SOURCES or TARGETS. Each target is a stem, and
            the last one the sum of all remaining stems.

    Shape:
        - samples: (2, length)
        - mixture: (2, length)
        - targets: (targets, 2, length)
    """
    mixture, targets = mixture.numpy(), targets.numpy()
    for index, (samples, gain) in enumerate(stems):
        if index < len(targets):
            np.multiply(samples, gain, out=targets[index])
        else:
            targets[-1] += samples * gain
    targets.sum(0, out=mixture)
