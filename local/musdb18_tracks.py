"""The tracks of MUSDB18: their files, found, checked and read."""

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
# Control characters and line breaks; surrogates stand for bytes that are not UTF-8.
UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DatasetError(UserError):
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
    root: Path | str, split: str, rate: int, suffix: str = "wav", sources: Sequence[str] = SOURCES
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
    root = Path(root)
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
    tracks: list[Track], valid_tracks: Path | str | None = None
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
            "--root: train/ holds none of musdb's 14 validation tracks; name some of its tracks"
            " in a file, a line each, and pass --valid_tracks FILE"
        )
    if not training:
        raise DatasetError("--root: every track of train/ is a validation track")
    return training, validation
