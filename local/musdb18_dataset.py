"""MUSDB18: its tracks, random training segments with augmentation, whole validation tracks.

The augmentation is that of Uhlich et al., "Improving music source separation based on deep neural
networks through data augmentation and network blending" (ICASSP 2017): stems of random tracks,
random gains, random swaps of the channels.
"""

import os
import re
import shlex
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

# In the order in which the published recipe stacks them as targets.
SOURCES = ("vocals", "bass", "drums", "other")
# What songs are separated into, as museval names it.
TARGETS = ("vocals", "accompaniment")

# musdb's own list (its configs/mus.yaml); importing musdb needs ffmpeg, which training does not.
VALIDATION_TRACKS = (
    "Actions - One Minute Smile",
    "Clara Berry And Wooldog - Waltz For My Victims",
    "Johnny Lokke - Promises & Lies",
    "Patrick Talbot - A Reason To Leave",
    "Triviul - Angelsaint",
    "Alexander Ross - Goodbye Bolero",
    "Fergessen - Nos Palpitants",
    "Leaf - Summerghost",
    "Skelpolu - Human Mistakes",
    "Young Griffo - Pennies",
    "ANiMAL - Rockshow",
    "James May - On The Line",
    "Meaxic - Take A Step",
    "Traffic Experiment - Sirens",
)
MOST_FAULTS_SHOWN = 20
MOST_WORKERS = 32  # of a loader; of more, some take the place of others
# Control characters and line breaks; surrogates stand for bytes that are not UTF-8.
UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DatasetError(ValueError):
    """A fault of the files under the data set's root."""


@dataclass(frozen=True)
class Track:
    """A folder with one stereo file per source, all of the same rate and length (in samples)."""

    folder: Path
    suffix: str
    rate: int
    length: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seconds(self) -> float:
        return self.length / self.rate

    def path(self, source: str) -> Path:
        return self.folder / f"{source}.{self.suffix}"

    def read(self, source: str, start: int = 0, length: int = -1) -> np.ndarray:
        """`length` samples (-1: the rest) of a source from `start` on, as (2, length) float32.

        Raises:
            DatasetError: the file cannot be read, is shorter, or holds NaN or infinity.
        """
        samples, unit = self.read_samples(source, start, length)
        return samples * unit

    def read_samples(
        self, source: str, start: int = 0, length: int = -1
    ) -> tuple[np.ndarray, np.float32]:
        """As read(), but (samples as they are stored, what to multiply them by).

        The samples are int16 where the file is a 16-bit wav, and float32 otherwise. A gain that
        joins the multiplication costs nothing, and changes no bit: the unit is a power of two.
        """
        path = self.path(source)
        expected = self.length - start if length == -1 else length
        try:
            frames = self._read_pcm16(path, start, expected)
            if frames is not None:
                return frames.T, np.float32(1 / 32768)
            name = os.fsencode(path)
            frames, _ = sf.read(name, length, start, dtype="float32", always_2d=True)
        except (OSError, sf.LibsndfileError) as error:
            raise DatasetError(f"{path}: cannot be read: {error}") from None
        if len(frames) != expected:
            raise DatasetError(
                f"{path}: {len(frames)} samples where {expected} were expected from sample {start}"
                " on; the file is damaged or was changed"
            )
        if frames.shape[1] != 2:
            raise DatasetError(
                f"{path}: expected 2 channels, got {frames.shape[1]}; the file was changed"
            )
        if not np.isfinite(frames).all():
            bad = start + int(np.argmin(np.isfinite(frames).all(axis=1)))
            raise DatasetError(
                f"{path}: not a finite number at sample {bad} ({bad / self.rate:.3f} s);"
                " mend or remove the file"
            )
        return frames.T, np.float32(1)

    def _read_pcm16(self, path: Path, start: int, length: int) -> np.ndarray | None:
        """(length, 2) int16; None where the file is no 16-bit wav or not what it was.

        libsndfile then reads it, or has the words for what is wrong. No memory map: a file that
        shrinks under one ends the process.
        """
        with open(path, "rb") as file:
            size = _find_pcm16(file, self.rate)
            if size != 4 * self.length or not 0 <= start <= self.length - length:
                return None
            file.seek(4 * start, os.SEEK_CUR)
            frames = np.empty((length, 2), "<i2")
            return frames if file.readinto(frames) == frames.nbytes else None


def _find_pcm16(file: BinaryIO, rate: int) -> int:
    """Goes to the samples of a 16-bit stereo wav; returns their bytes, 0 for any other file."""
    head = file.read(12)
    if head[:4] + head[8:] != b"RIFFWAVE":
        return 0
    pcm16 = struct.pack("<HHIIHH", 1, 2, rate, 4 * rate, 4, 16)
    layout = b""
    while chunk := file.read(8):
        size = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            return size if layout == pcm16 else 0
        end = file.tell() + size + size % 2
        if chunk[:4] == b"fmt ":
            layout = file.read(16)
        file.seek(end)
    return 0


def find_tracks(
    root: Path, split: str, rate: int, suffix: str = "wav", sources: Sequence[str] = SOURCES
) -> list[Track]:
    """The tracks of ROOT/`split`, sorted by name, after a look at the header of every file.

    Args:
        root: folder of MUSDB18-HQ.
        split: "train" or "test".
        rate: the sampling rate, in Hz, that every file must have.
        suffix: of the files, "wav" or "flac".
        sources: the files that a track must have.

    Raises:
        DatasetError: the layout is not that of MUSDB18-HQ; or lists what is wrong with the files.
    """
    folder = root / split
    if not root.is_dir():
        raise DatasetError(f"--root: no such folder: {root}")
    if not folder.is_dir():
        raise DatasetError(
            f"--root: {root} holds no {split}/TRACK/vocals.{suffix}; it must be the"
            " folder that train/ and test/ are in"
        )
    # Hidden folders are half-made tracks and the litter of file browsers.
    entries = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    folders = [path for path in entries if path.is_dir()]
    links = [path for path in entries if path.is_symlink() and not path.exists()]
    if not folders and not links:
        if any(folder.glob("*.stem.mp4")):
            raise DatasetError(
                f"--root: {root} holds .stem.mp4 files; decode them once, with"
                f" python -m local.stems {shlex.quote(str(root))} OUT, and use --root OUT"
            )
        raise DatasetError(f"--root: {folder} holds no tracks, TRACK/vocals.{suffix}")
    faults = [f"{split}/{path.name}: a link that leads nowhere" for path in links]
    faults += find_name_faults(path.name for path in folders)
    tracks = [_open_track(path, rate, suffix, sources, faults) for path in folders]
    raise_dataset_faults(root, faults)
    return tracks


def find_name_faults(names: Iterable[str]) -> list[str]:
    """The names of tracks that no text file or terminal could hold as they are, a line each."""
    return [
        f"{ascii(name)}: rename it; its name holds control characters or is not UTF-8"
        for name in names
        if UNFIT_FOR_NAMES.search(name)
    ]


def _open_track(
    folder: Path, rate: int, suffix: str, sources: Sequence[str], faults: list[str]
) -> Track | None:
    """A track, or None and what is wrong with it added to `faults`."""
    where = f"{folder.parent.name}/{folder.name}"
    known = len(faults)
    lengths = {}
    for source in sources:
        name = f"{source}.{suffix}"
        path = folder / name
        if not path.exists():
            others = sorted(p.name for p in folder.glob(f"{source}.*") if p.suffix != path.suffix)
            hint = f" (there is {', '.join(others)}: see --suffix)" if others else ""
            faults.append(f"{where}/{name}: missing{hint}")
            continue
        try:
            info = sf.info(os.fsencode(path))
        except (OSError, sf.LibsndfileError) as error:
            faults.append(f"{where}/{name}: cannot be read: {_reason(error)}")
            continue
        lengths[name] = info.frames
        if info.frames == 0:
            faults.append(f"{where}/{name}: no samples")
        if info.channels != 2:
            faults.append(f"{where}/{name}: expected 2 channels, got {info.channels}")
        if info.samplerate != rate:
            faults.append(
                f"{where}/{name}: expected {rate} Hz (--sample_rate), got {info.samplerate} Hz"
            )
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        faults.append(f"{where}: files of different lengths, in samples: {found}")
    if len(faults) > known:
        return None
    return Track(folder, suffix, rate, lengths[name])


def _reason(error: Exception) -> str:
    """libsndfile's words without the path that its wrapper puts before them."""
    return str(error).rpartition(": ")[2]


def raise_dataset_faults(root: Path, faults: list[str]) -> None:
    """Raises one DatasetError for all faults, a line each; does nothing where there are none."""
    if not faults:
        return
    lines = faults[:MOST_FAULTS_SHOWN]
    if len(faults) > len(lines):
        lines.append(f"and {len(faults) - len(lines)} more")
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    heading = f"--root: {count} in {root}; mend or remove these tracks"
    raise DatasetError("\n  ".join([heading, *lines]))


def split_validation(
    tracks: list[Track], valid_tracks: Path | None = None
) -> tuple[list[Track], list[Track]]:
    """(training, validation) tracks: the validation tracks are musdb's, or those in a file.

    Args:
        tracks: of the train split.
        valid_tracks: a file with a track name per line.

    Raises:
        DatasetError: a name in the file is no track, or one of the two parts would be empty.
    """
    names = VALIDATION_TRACKS
    if valid_tracks is not None:
        try:
            lines = valid_tracks.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"--valid_tracks: cannot be read: {error}") from None
        names = [line.strip() for line in lines if line.strip()]
        unknown = sorted(set(names) - {track.name for track in tracks})
        if unknown:
            raise DatasetError(f"--valid_tracks: not in train/: {', '.join(unknown)}")
    training = [track for track in tracks if track.name not in names]
    validation = [track for track in tracks if track.name in names]
    if not validation:
        raise DatasetError(
            "--root: train/ holds none of musdb's 14 validation tracks; name some of its tracks"
            " in a file, a line each, and pass --valid_tracks FILE"
        )
    if not training:
        raise DatasetError("--root: every track of train/ is a validation track")
    return training, validation


class Reading:
    """What every worker of a loader is reading, in memory that outlives it."""

    def __init__(self):
        self._rows = torch.zeros(MOST_WORKERS, 3, dtype=torch.int64).share_memory_()

    def note(self, track: int, source: int) -> None:
        """To be called by a worker before it reads a source of a track."""
        if (worker := get_worker_info()) is not None:
            self._rows.numpy()[worker.id % MOST_WORKERS] = os.getpid(), track, source

    def find(self, pid: int) -> tuple[int, int] | None:
        """(track, source) of which a worker was told last."""
        for owner, track, source in self._rows.tolist():
            if owner == pid:
                return track, source
        return None


class SegmentDataset(Dataset):
    """Random segments: every stem of an item comes from a track of its own.

    An item is a pure function of (seed, epoch, index), so it is the same for any number of
    workers, on any rank and after a resume. A DataLoader needs collate_fn=keep_batch.

    Args:
        tracks: the training tracks.
        length: samples in a segment.
        samples_per_track: an epoch has tracks x samples_per_track items.
        mix_background: the targets are vocals and the sum of the others, else all of SOURCES.
        seed: of the random draws.

    Raises:
        DatasetError: lists the tracks that are shorter than a segment.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        length: int,
        samples_per_track: int = 64,
        mix_background: bool = True,
        seed: int = 0,
    ):
        short = [
            f"{track.folder.parent.name}/{track.name}: {track.seconds:.2f} s, shorter than"
            f" --segment {length / track.rate:g}"
            for track in tracks
            if track.length < length
        ]
        raise_dataset_faults(tracks[0].folder.parents[1], short)
        self.tracks, self.length, self.samples_per_track = tracks, length, samples_per_track
        self.mix_background, self.seed = mix_background, seed
        self.reading = Reading()

    def __len__(self) -> int:
        return len(self.tracks) * self.samples_per_track

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The item at (epoch, index).

        Shape:
            - mixture: (2, length), the sum of the targets
            - targets: (targets, 2, length)
        """
        mixtures, targets = self.__getitems__([position])
        return mixtures[0], targets[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The batch of the items at M positions (epoch, index), as a DataLoader asks for it.

        Shape:
            - mixtures: (M, 2, length), the sums of the targets
            - targets: (M, targets, 2, length)
        """
        mixtures, targets = _allocate(self.mix_background, self.length, len(positions))
        if get_worker_info() is not None:
            # A batch leaves a worker through shared memory: moved there empty, it is written once.
            mixtures.share_memory_()
            targets.share_memory_()
        for (epoch, index), *item in zip(positions, mixtures, targets, strict=True):
            rng = np.random.default_rng((self.seed, epoch, index))
            mix_targets((self._draw_stem(source, rng) for source in SOURCES), *item)
        return mixtures, targets

    def _draw_stem(self, source: str, rng: np.random.Generator) -> tuple[np.ndarray, np.float32]:
        number = rng.integers(len(self.tracks))
        self.reading.note(number, SOURCES.index(source))
        track = self.tracks[number]
        start = int(rng.integers(track.length - self.length + 1))
        gain = np.float32(rng.uniform(0.25, 1.25))
        swap = rng.random() < 0.5
        samples, unit = track.read_samples(source, start, self.length)
        return (samples[::-1] if swap else samples), gain * unit


def keep_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate function for SegmentDataset, which makes whole batches itself."""
    return batch


class TrackDataset(Dataset):
    """Whole tracks as they are: (mixture, targets) as in SegmentDataset."""

    def __init__(self, tracks: Sequence[Track], mix_background: bool = True):
        self.tracks, self.mix_background = tracks, mix_background
        self.reading = Reading()

    def __len__(self) -> int:
        return len(self.tracks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        track = self.tracks[index]
        mixture, targets = _allocate(self.mix_background, track.length)
        mix_targets((self._read_stem(index, source) for source in SOURCES), mixture, targets)
        return mixture, targets

    def _read_stem(self, index: int, source: str) -> tuple[np.ndarray, np.float32]:
        self.reading.note(index, SOURCES.index(source))
        return self.tracks[index].read_samples(source)


def _allocate(mix_background: bool, length: int, *batch: int) -> tuple[Tensor, Tensor]:
    """(mixture, targets) to be filled by mix_targets, with the dimensions of a batch in front."""
    count = 2 if mix_background else len(SOURCES)
    return (
        torch.empty(*batch, 2, length, dtype=torch.float32),
        torch.empty(*batch, count, 2, length, dtype=torch.float32),
    )


def mix_targets(
    stems: Iterable[tuple[np.ndarray, np.float32]], mixture: Tensor, targets: Tensor
) -> None:
    """Fills mixture and targets from the stems, each (samples, what to multiply by).

    Args:
        stems: in the order of SOURCES.
        mixture: becomes the sum of the targets.
        targets: become a stem each, the last one the sum of all stems that are left.

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
