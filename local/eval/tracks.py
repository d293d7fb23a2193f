"""The test tracks: the samples that musdb gives, from wav, flac or .stem.mp4 files."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from local.musdb18_tracks import (
    SOURCES,
    DatasetError,
    Track,
    find_name_faults,
    find_tracks,
    raise_dataset_faults,
)
from local.stems import STREAMS, decode_track, probe_rate, stem_files, track_name
from local.tools.ffmpeg import need_ffmpeg

FILES = ("mixture", *SOURCES)
PACKED_BYTES = 160_000  # of a second of a .stem.mp4 file: five streams of 256 kbit/s


@dataclass(frozen=True)
class PackedTrack:
    """A track in a .stem.mp4 file."""

    path: Path
    rate: int

    @property
    def name(self) -> str:
        return track_name(self.path)

    @property
    def seconds(self) -> float:
        """About what it lasts, by the size of the file."""
        return self.path.stat().st_size / PACKED_BYTES


TestTrack = Track | PackedTrack


def open_test_set(root: Path, rate: int, suffix: str) -> list[TestTrack]:
    """The test tracks, sorted by name.

    Raises:
        DatasetError: lists what is wrong with the files (of a wav or flac tree).
        UserError: ffmpeg is missing for .stem.mp4 files.
    """
    packed = stem_files(root, "test")
    folders = [path for path in (root / "test").glob("[!.]*") if path.is_dir()]
    if not packed or folders:
        return find_tracks(root, "test", rate, suffix, FILES)
    need_ffmpeg()
    raise_dataset_faults(root, find_name_faults(track_name(path) for path in packed))
    found = probe_rate(packed[0])
    if found not in (rate, None):
        raise DatasetError(f"--root: {packed[0]}: expected {rate} Hz, the model's, got {found} Hz")
    return [PackedTrack(path, rate) for path in packed]


def list_files(track: TestTrack) -> list[Path]:
    """The files that a track is read from."""
    return [track.path(name) for name in FILES] if isinstance(track, Track) else [track.path]


def describe_files(track: TestTrack) -> dict[str, list[int]]:
    """name -> [bytes, time of the last change in ns], by which changed files are noticed."""
    stats = {file.name: file.stat() for file in list_files(track)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_mixture(track: TestTrack) -> np.ndarray:
    """(2, T) float32, the samples that musdb gives: see `read_track`."""
    with unpacked(track, ["mixture"]) as files:
        return _read_16_bit(files, "mixture")


def read_track(track: TestTrack) -> dict[str, np.ndarray]:
    """{"mixture", "vocals", "accompaniment"} -> (2, T) float32, the samples that musdb gives.

    These are on the grid of 16-bit integers, whatever the files hold, and float32 holds them and
    their sums exactly.

    Raises:
        ValueError: it cannot be read.
    """
    with unpacked(track, FILES) as files:
        others = (_read_16_bit(files, source) for source in SOURCES if source != "vocals")
        return {
            "mixture": _read_16_bit(files, "mixture"),
            "vocals": _read_16_bit(files, "vocals"),
            "accompaniment": sum(others),
        }


@contextmanager
def unpacked(track: TestTrack, names: Sequence[str]) -> Iterator[Track]:
    """A track as a folder of files, of which only those in `names` need be there."""
    if isinstance(track, Track):
        yield track
        return
    with tempfile.TemporaryDirectory() as folder:
        streams = [name for name in STREAMS if name in names]
        decode_track(track.path, Path(folder, "test", track.name), streams)
        (files,) = find_tracks(Path(folder), "test", track.rate, "wav", streams)
        yield files


def _read_16_bit(track: Track, name: str) -> np.ndarray:
    # As ffmpeg converts for musdb: it rounds floats, and drops the low bits of longer integers.
    audio, kind = track.read(name), sf.info(os.fsencode(track.path(name))).subtype
    if kind == "PCM_16":
        return audio
    to_integer = np.rint if kind in ("FLOAT", "DOUBLE") else np.floor
    scaled = to_integer(audio.astype(np.float64) * 32768)
    return (np.clip(scaled, -32768, 32767) / 32768).astype(np.float32)
