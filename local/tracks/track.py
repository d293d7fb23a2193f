"""A track: which files make its stems, and their samples."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf

from local.tools.command_line import UserError
from local.tools.sound_files import describe_fault, read_pcm16

# In the order in which the published recipe stacks them as targets.
SOURCES = ("vocals", "bass", "drums", "other")
# What a track is separated into, in museval's words; also the stems of a karaoke pair.
TARGETS = ("vocals", "accompaniment")
MOST_FAULTS_SHOWN = 20


class DatasetError(UserError):
    """The files of the data set are missing, damaged or not as expected."""


@dataclass(frozen=True)
class Place:
    """Where a track was found.

    Args:
        path: a folder, or a .stem.mp4 file.
        name: that no other track of the data set has.
        own_name: without the root, which `name` holds where several roots have such a track.
        root: as --root names it.
        split: "train", "valid" or "test".
    """

    path: Path
    name: str
    own_name: str
    root: Path
    split: str

    def __str__(self) -> str:
        return str(self.path.relative_to(self.root))


class Part(NamedTuple):
    """A file of a stem, which is added or subtracted."""

    file: str
    sign: int = 1


@dataclass(frozen=True)
class Track:
    """A folder of stereo files of the same rate and length (in samples).

    Args:
        stems: stem -> its parts, of which it is the sum; without any, it is silent. The stems are
            SOURCES, or for a karaoke pair TARGETS, and "mixture" where it was asked for.
        unused: audio files in the folder that are nothing by their names.
    """

    place: Place
    rate: int
    length: int
    stems: dict[str, tuple[Part, ...]] = field(compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def folder(self) -> Path:
        return self.place.path

    @property
    def seconds(self) -> float:
        return self.length / self.rate

    @property
    def sources(self) -> list[str]:
        """The stems whose sum is the mixture: SOURCES or TARGETS."""
        return [stem for stem in self.stems if stem != "mixture"]

    @property
    def is_pair(self) -> bool:
        return "accompaniment" in self.stems

    @property
    def has_mixture(self) -> bool:
        """Whether "mixture" is a file of its own, and not the sum of the stems."""
        return self.stems.get("mixture") != sum_parts(self.stems[name] for name in self.sources)

    def paths(self, *stems: str) -> list[Path]:
        """The files of some stems, or of all."""
        parts = sum_parts(self.stems[stem] for stem in stems or self.stems)
        return [self.folder / name for name in dict.fromkeys(part.file for part in parts)]

    def path(self, stem: str) -> Path:
        """The file of a stem that has one."""
        (path,) = self.paths(stem)
        return path

    def read(self, stem: str, start: int = 0, length: int = -1) -> np.ndarray:
        """Reads a stem as float32.

        Args:
            start, length: in samples; -1 reads to the end.

        Shape:
            - returned: (2, length)

        Raises:
            DatasetError: a file cannot be read, is too short, or holds NaN or infinity.
        """
        samples, unit = self.read_samples(stem, start, length)
        return samples * unit

    def read_samples(
        self, stem: str, start: int = 0, length: int = -1
    ) -> tuple[np.ndarray, np.float32]:
        """As read(), but (samples, unit): samples * unit is the audio.

        The samples are int16 if the stem is one 16-bit wav, and float32 otherwise. The unit is a
        power of two, so multiplying it by a gain first does not change any bit.
        """
        parts = self.stems[stem]
        if len(parts) == 1 and parts[0].sign == 1:
            return self.read_file(self.folder / parts[0].file, start, length)
        expected = self.length - start if length == -1 else length
        total = np.zeros((2, expected), np.float32)
        for file, sign in parts:
            samples, unit = self.read_file(self.folder / file, start, length)
            total += samples * (unit * np.float32(sign))
        return total, np.float32(1)

    def read_file(self, path: Path, start: int, length: int) -> tuple[np.ndarray, np.float32]:
        """(samples, unit) of a file of the track, as in `read_samples`."""
        expected = self.length - start if length == -1 else length
        try:
            frames = read_pcm16(path, self.rate, self.length, start, expected)
            if frames is not None:
                return frames.T, np.float32(1 / 32768)
            name = os.fsencode(path)
            frames, rate = sf.read(name, length, start, dtype="float32", always_2d=True)
        except (OSError, sf.LibsndfileError):
            raise DatasetError(f"{path}: {describe_fault(path)}") from None
        if len(frames) != expected:
            raise DatasetError(
                f"{path}: expected {expected} samples from sample {start} on, got {len(frames)};"
                " the file is damaged or was changed"
            )
        if (frames.shape[1], rate) != (2, self.rate):
            found = f"got {frames.shape[1]} at {rate} Hz; the file was changed"
            raise DatasetError(f"{path}: expected 2 channels at {self.rate} Hz, {found}")
        if not np.isfinite(frames).all():
            bad = start + int(np.argmin(np.isfinite(frames).all(axis=1)))
            raise DatasetError(
                f"{path}: not a finite number at sample {bad} ({bad / self.rate:.3f} s);"
                " fix or remove the file"
            )
        return frames.T, np.float32(1)


def sum_parts(stems: Iterable[tuple[Part, ...]]) -> tuple[Part, ...]:
    """The parts of the sum of some stems."""
    return sum(stems, ())


def raise_dataset_faults(
    faults: dict[Path, list[str]], remedies: dict[Path, list[str]] | None = None
) -> None:
    """Raises one DatasetError that lists all faults, if there are any.

    Args:
        faults: root -> what is wrong with its files.
        remedies: root -> what helps, besides to fix or remove tracks.
    """
    texts = [
        _list_faults(root, lines, (remedies or {}).get(root, []))
        for root, lines in faults.items()
        if lines
    ]
    if texts:
        raise DatasetError("\n".join(texts))


def shorten_faults(faults: list[str]) -> list[str]:
    """The first faults, and how many more there are."""
    more = len(faults) - MOST_FAULTS_SHOWN
    return faults[:MOST_FAULTS_SHOWN] + ([f"and {more} more"] if more > 0 else [])


def _list_faults(root: Path, faults: list[str], remedies: list[str]) -> str:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    remedy = "; ".join(["fix or remove these tracks", *remedies])
    return "\n  ".join([f"--root: {count} in {root}; {remedy}", *shorten_faults(faults)])
