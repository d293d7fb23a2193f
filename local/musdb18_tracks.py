"""The tracks of MUSDB18: finds, checks and reads their files."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile as sf

from local.stems import STREAMS, stem_files
from local.tools.choices import SUFFIXES
from local.tools.command_line import UserError
from local.tools.files import is_foreign
from local.tools.sound_files import describe_fault, read_pcm16

# In the order in which the published recipe stacks them as targets.
SOURCES = ("vocals", "bass", "drums", "other")
# What a track is separated into, in museval's words.
TARGETS = ("vocals", "accompaniment")
DEMO_NOTE = ".demo_musdb18.json"  # in the folder of a demo data set: what it was made with
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
UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's, of a flac that was written to a pipe
# Control characters, line breaks, and surrogates, which stand for bytes that are not UTF-8.
UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DatasetError(UserError):
    """The files of the data set are missing, damaged or not as expected."""


@dataclass(frozen=True)
class Track:
    """A folder with one stereo file per source, all of the same rate and length (in samples).

    Args:
        names: of files in other letters than SOURCE.SUFFIX, such as vocals.WAV.
    """

    folder: Path
    suffix: str
    rate: int
    length: int
    names: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seconds(self) -> float:
        return self.length / self.rate

    def path(self, source: str) -> Path:
        return self.folder / self.names.get(source, f"{source}.{self.suffix}")

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
    try:
        links = [path for path in sorted(folder.iterdir()) if _is_broken_link(path)]
    except OSError as error:
        raise DatasetError(f"--root: {folder} cannot be read: {error.strerror}") from None
    folders = list_folders(folder)
    if not folders and not links:
        if stem_files(root, split):
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


def list_folders(folder: Path) -> list[Path]:
    """The folders in ROOT/train or ROOT/test that should be tracks, sorted.

    Those that systems have made are none: see `is_foreign`. But a track may have their name.
    """
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.is_dir() and (not is_foreign(path) or _is_named_as_by_a_system(path))
    ]


def _is_named_as_by_a_system(folder: Path) -> bool:
    """Whether a folder holds audio files of a track, and is not hidden."""
    files = {f"{name}.{suffix}" for name in STREAMS for suffix in SUFFIXES}
    return folder.name[0] != "." and any(path.name.casefold() in files for path in folder.glob("*"))


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists() and not is_foreign(path)


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
    lengths, names = {}, {}
    try:
        there = sorted(os.listdir(folder))
    except OSError as error:
        faults.append(f"{where}: cannot be read: {error.strerror}")
        return None
    for source in sources:
        name = f"{source}.{suffix}"
        found = [other for other in there if other.casefold() == name]
        if len(found) != 1:
            faults.append(f"{where}/{name}: {_describe_choice(found, source, there)}")
            continue
        (name,) = found
        if name != f"{source}.{suffix}":
            names[source] = name
        try:
            info = sf.info(os.fsencode(folder / name))
        except (OSError, sf.LibsndfileError):
            faults.append(f"{where}/{name}: {describe_fault(folder / name)}")
            continue
        if info.frames == UNKNOWN_LENGTH:
            faults.append(
                f"{where}/{name}: its header does not say how long it is; write it again, for"
                " example with ffmpeg"
            )
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
    return Track(folder, suffix, rate, lengths[name], names)


def _describe_choice(found: list[str], source: str, there: list[str]) -> str:
    """Why no file, or none of those found, is the one of a source."""
    if found:
        return f"{' and '.join(found)} are both there; remove all but one"
    others = [name for name in there if name.casefold().startswith(f"{source}.")]
    return "missing" + (f" (found {', '.join(others)}: see --suffix)" if others else "")


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
