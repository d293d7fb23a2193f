"""The tracks of MUSDB18: finds, checks and reads their files."""

import os
import re
import shlex
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf

from local.tools.command_line import UserError

# In the order in which the published recipe stacks them as targets.
SOURCES = ("vocals", "bass", "drums", "other")
# What a track is separated into, in museval's words.
TARGETS = ("vocals", "accompaniment")
# The list in musdb's configs/mus.yaml. Importing musdb needs ffmpeg, which training does not need.
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
# Control characters, line breaks, and surrogates, which stand for bytes that are not UTF-8.
UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DatasetError(UserError):
    """The files of the data set are missing, damaged or not as expected."""


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
        """Reads a source as float32.

        Args:
            start, length: in samples; -1 reads to the end.

        Shape:
            - returned: (2, length)

        Raises:
            DatasetError: the file cannot be read, is too short, or holds NaN or infinity.
        """
        samples, unit = self.read_samples(source, start, length)
        return samples * unit

    def read_samples(
        self, source: str, start: int = 0, length: int = -1
    ) -> tuple[np.ndarray, np.float32]:
        """As read(), but (samples, unit): samples * unit is the audio.

        The samples are int16 if the file is a 16-bit wav, and float32 otherwise. The unit is a
        power of two, so multiplying it by a gain first does not change any bit.
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
                f"{path}: expected {expected} samples from sample {start} on, got {len(frames)};"
                " the file is damaged or was changed"
            )
        if frames.shape[1] != 2:
            raise DatasetError(
                f"{path}: expected 2 channels, got {frames.shape[1]}; the file was changed"
            )
        if not np.isfinite(frames).all():
            bad = start + int(np.argmin(np.isfinite(frames).all(axis=1)))
            raise DatasetError(
                f"{path}: not a finite number at sample {bad} ({bad / self.rate:.3f} s);"
                " fix or remove the file"
            )
        return frames.T, np.float32(1)

    def _read_pcm16(self, path: Path, start: int, length: int) -> np.ndarray | None:
        """Reads (length, 2) int16; None if the file is no 16-bit wav or has changed.

        Then libsndfile reads it, or reports what is wrong. Not a memory map: if the file shrank,
        the process would be killed.
        """
        with open(path, "rb") as file:
            size = _find_pcm16(file, self.rate)
            if size != 4 * self.length or not 0 <= start <= self.length - length:
                return None
            file.seek(4 * start, os.SEEK_CUR)
            frames = np.empty((length, 2), "<i2")
            return frames if file.readinto(frames) == frames.nbytes else None


def _find_pcm16(file: BinaryIO, rate: int) -> int:
    """Seeks to the samples of a 16-bit stereo wav; returns their bytes, or 0 for other files."""
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
    root: Path | str, split: str, rate: int, suffix: str = "wav", sources: Sequence[str] = SOURCES
) -> list[Track]:
    """The tracks of root/split, sorted by name; checks the header of every file.

    Args:
        root: folder of MUSDB18-HQ, with train/ and test/.
        split: "train" or "test".
        rate: the sampling rate, in Hz, that every file must have.
        suffix: of the files, "wav" or "flac".
        sources: the files that a track must have.

    Raises:
        DatasetError: the layout is not that of MUSDB18-HQ, or some files are wrong; lists them.
    """
    root = Path(root)
    folder = root / split
    if not root.is_dir():
        raise DatasetError(f"--root: no such folder: {root}")
    if not folder.is_dir():
        raise DatasetError(
            f"--root: {root} holds no {split}/TRACK/vocals.{suffix}; pass the folder that holds"
            " train/ and test/"
        )
    # Hidden folders are unfinished tracks or belong to file browsers.
    entries = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    folders = [path for path in entries if path.is_dir()]
    links = [path for path in entries if path.is_symlink() and not path.exists()]
    if not folders and not links:
        if any(folder.glob("*.stem.mp4")):
            raise DatasetError(
                f"--root: {root} holds .stem.mp4 files; decode them once with"
                f" python -m local.stems {shlex.quote(str(root))} OUT, and use --root OUT"
            )
        raise DatasetError(f"--root: {folder} holds no tracks, TRACK/vocals.{suffix}")
    faults = [f"{split}/{path.name}: a broken symbolic link" for path in links]
    faults += find_name_faults(path.name for path in folders)
    tracks = [_open_track(path, rate, suffix, sources, faults) for path in folders]
    raise_dataset_faults(root, faults)
    return tracks


def find_name_faults(names: Iterable[str]) -> list[str]:
    """The names of tracks that cannot be printed or written to text files, a line each."""
    return [
        f"{ascii(name)}: rename it; its name holds control characters or is not UTF-8"
        for name in names
        if UNFIT_FOR_NAMES.search(name)
    ]


def _open_track(
    folder: Path, rate: int, suffix: str, sources: Sequence[str], faults: list[str]
) -> Track | None:
    """The track in a folder; or None, with what is wrong appended to `faults`."""
    where = f"{folder.parent.name}/{folder.name}"
    known = len(faults)
    lengths = {}
    for source in sources:
        name = f"{source}.{suffix}"
        path = folder / name
        if not path.exists():
            others = sorted(p.name for p in folder.glob(f"{source}.*") if p.suffix != path.suffix)
            hint = f" (found {', '.join(others)}: see --suffix)" if others else ""
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
    """libsndfile's message without the path that soundfile puts before it."""
    return str(error).rpartition(": ")[2]


def raise_dataset_faults(root: Path, faults: list[str]) -> None:
    """Raises one DatasetError that lists all faults, if there are any."""
    if not faults:
        return
    lines = faults[:MOST_FAULTS_SHOWN]
    if len(faults) > len(lines):
        lines.append(f"and {len(faults) - len(lines)} more")
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    heading = f"--root: {count} in {root}; fix or remove these tracks"
    raise DatasetError("\n  ".join([heading, *lines]))


def split_validation(
    tracks: list[Track], valid_tracks: Path | str | None = None
) -> tuple[list[Track], list[Track]]:
    """Splits the tracks of train/ into (training, validation).

    Args:
        valid_tracks: a file with the name of a validation track per line; None for musdb's list.

    Raises:
        DatasetError: a name in the file is not a track, or one of the two parts is empty.
    """
    names = VALIDATION_TRACKS
    if valid_tracks is not None:
        try:
            lines = Path(valid_tracks).read_text(encoding="utf-8").splitlines()
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
            "--root: train/ holds none of musdb's 14 validation tracks; write the names of some of"
            " its tracks to a file, one per line, and pass --valid_tracks FILE"
        )
    if not training:
        raise DatasetError("--root: every track of train/ is a validation track")
    return training, validation
