"""Read the test tracks from wav, flac or .stem.mp4 files: the samples that musdb returns.

musdb puts all files on the grid of 16 bits, which ends at full scale, ±1. `float32` below reads the
samples as they are instead, to float32 rounding.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile as sf

from local.musdb18_tracks import (
    SOURCES,
    DatasetError,
    Track,
    find_name_faults,
    find_tracks,
    list_folders,
    raise_dataset_faults,
)
from local.stems import STREAMS, decode_track, probe_rate, stem_files, track_name
from local.tools.ffmpeg import need_ffmpeg

FILES = ("mixture", *SOURCES)
PACKED_BYTES = 160_000  # a second of a .stem.mp4 file, five streams of 256 kbit/s


@dataclass(frozen=True)
class PackedTrack:
    """A track in a .stem.mp4 file."""

    path: Path
    rate: int

    @property
    def name(self) -> str:
        return track_name(self.path)

    @cached_property  # the file may go during a run, which is found where it is read
    def seconds(self) -> float:
        """Estimate the duration from the size of the file."""
        return self.path.stat().st_size / PACKED_BYTES


TestTrack = Track | PackedTrack


def open_test_set(root: Path, rate: int, suffix: str) -> list[TestTrack]:
    """Find the test tracks, sorted by name, and check their files.

    Raises:
        DatasetError: lists the faults of the files.
        UserError: ffmpeg is missing for .stem.mp4 files.
    """
    packed = stem_files(root, "test")
    if not packed or list_folders(root / "test"):
        return find_tracks(root, "test", rate, suffix, FILES)
    need_ffmpeg()
    raise_dataset_faults(root, find_name_faults(track_name(path) for path in packed))
    found = probe_rate(packed[0])
    if found not in (rate, None):
        raise DatasetError(f"--root: {packed[0]}: expected the model's {rate} Hz, got {found} Hz")
    return [PackedTrack(path, rate) for path in packed]


def list_files(track: TestTrack) -> list[Path]:
    """Return the files that a track is read from."""
    return [track.path(name) for name in FILES] if isinstance(track, Track) else [track.path]


def describe_files(track: TestTrack) -> dict[str, list[int]]:
    """Return name -> [bytes, time of the last change in ns]: a changed file has another."""
    stats = {file.name: file.stat() for file in list_files(track)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_mixture(track: TestTrack, float32: bool = False) -> np.ndarray:
    """Read the mixture as (2, T) float32: see `read_track`."""
    with unpacked(track, ["mixture"]) as files:
        return _read(files, "mixture", float32)[0]


def read_track(
    track: TestTrack, float32: bool = False, with_stems: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Read a track. float32 holds 16-bit samples and their sums exactly.

    Args:
        with_stems: give the stems of the accompaniment, too.

    Returns:
        ({"mixture", "vocals", "accompaniment"} -> (2, T) float32,
        file -> how many of its samples are beyond full scale and were clipped, if any).

    Raises:
        ValueError: the track cannot be read.
    """
    audio, clipped = {}, {}
    with unpacked(track, FILES) as files:
        for name in FILES:
            samples, count = _read(files, name, float32)
            target = name if name in ("mixture", "vocals") else "accompaniment"
            audio[target] = audio[target] + samples if target in audio else samples
            if with_stems:
                audio[name] = samples
            if count:
                clipped[name] = count
    return audio, clipped


@contextmanager
def unpacked(track: TestTrack, names: Sequence[str]) -> Iterator[Track]:
    """Yield a track as a folder of files, with those of `names` at least."""
    if isinstance(track, Track):
        yield track
        return
    with tempfile.TemporaryDirectory() as folder:
        streams = [name for name in STREAMS if name in names]
        # As floats: AAC may decode to samples beyond full scale, which are counted.
        decode_track(track.path, Path(folder, "test", track.name), streams, "pcm_f32le")
        (files,) = find_tracks(Path(folder), "test", track.rate, "wav", streams)
        yield files


def _read(track: Track, name: str, float32: bool) -> tuple[np.ndarray, int]:
    """Return (the samples of a file, how many of them were clipped)."""
    audio, kind = track.read(name), sf.info(os.fsencode(track.path(name))).subtype
    if float32 or kind == "PCM_16":
        return audio, 0
    # As ffmpeg converts for musdb: floats are rounded, longer integers lose their low bits.
    to_integer = np.rint if kind in ("FLOAT", "DOUBLE") else np.floor
    scaled = to_integer(audio.astype(np.float64) * 32768)
    on_grid = (np.clip(scaled, -32768, 32767) / 32768).astype(np.float32)
    return on_grid, int(np.count_nonzero(np.abs(audio) > 1))
