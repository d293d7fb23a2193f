"""Read the test tracks from wav, flac or .stem.mp4 files: the samples that musdb returns.

musdb puts all files on the grid of 16 bits, which ends at full scale, ±1. `float32` below reads the
samples as they are instead, to float32 rounding.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import soundfile as sf

from local.musdb18_tracks import (
    SOURCES,
    TRAINING_SPLITS,
    DatasetError,
    Track,
    choose_validation,
)
from local.stems import STREAMS, decode_track, probe_rate
from local.tools.ffmpeg import need_ffmpeg
from local.tools.files import stamp_files
from local.tracks.roots import Roots, list_places
from local.tracks.stem_files import open_files, open_tracks, read_rules
from local.tracks.track import Part, Place, raise_dataset_faults

FILES = ("mixture", *SOURCES)
PACKED_BYTES = 160_000  # a second of a .stem.mp4 file, five streams of 256 kbit/s


@dataclass(frozen=True)
class PackedTrack:
    """A track in a .stem.mp4 file."""

    place: Place
    rate: int

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def path(self) -> Path:
        return self.place.path

    @cached_property  # the file may go during a run, which is found where it is read
    def seconds(self) -> float:
        """Estimate the duration from the size of the file."""
        return self.path.stat().st_size / PACKED_BYTES


TestTrack = Track | PackedTrack


def open_test_set(
    roots: Roots,
    rate: int,
    suffix: str = "auto",
    stem_names: str = "",
    missing_stems: str = "error",
    split: str = "test",
    valid_tracks: Path | str | None = None,
) -> list[TestTrack]:
    """Find the tracks of a split of all roots that have it, sorted by name; check their files.

    Args:
        suffix, stem_names, missing_stems: see `find_tracks`.
        split: "test"; "train" and "valid" are what train.py trains and validates on.
        valid_tracks: see `choose_validation`.

    Raises:
        DatasetError: lists the faults of the files, or the split is empty.
        UserError: ffmpeg is missing for .stem.mp4 files.
    """
    rules = read_rules(suffix, stem_names, missing_stems)
    if split == "test":
        places = list_places(roots, ["test"], packed=True)
    else:
        parts = choose_validation(list_places(roots, TRAINING_SPLITS, packed=True), valid_tracks)
        places = parts[split == "valid"]
    if not places:
        raise DatasetError(f"--split {split}: no track of --root is in it; see --valid_tracks")
    folders = [place for place in places if place.path.is_dir()]
    packed = [PackedTrack(place, rate) for place in places if place not in folders]
    if packed:
        need_ffmpeg()
        found = probe_rate(packed[0].path)
        if found not in (rate, None):
            fault = f"expected the model's {rate} Hz, got {found} Hz"
            raise DatasetError(f"--root: {packed[0].path}: {fault}")
    tracks = packed + open_tracks(folders, rate, rules, with_mixture=True)
    return sorted(tracks, key=lambda track: track.name)


def list_files(track: TestTrack) -> list[Path]:
    """Return the files that a track is read from."""
    return track.paths() if isinstance(track, Track) else [track.path]


def describe_files(track: TestTrack) -> dict[str, list[int]]:
    """Return the versions of its files by their names: see `stamp_files`."""
    return stamp_files({file.name: file for file in list_files(track)})


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
        for name in ("mixture", *files.sources):
            samples, count = _read(files, name, float32)
            target = name if name in ("mixture", "vocals") else "accompaniment"
            audio[target] = audio[target] + samples if target in audio else samples
            if with_stems:
                audio[name] = samples
            if count and (name != "mixture" or files.has_mixture):
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
        decode_track(track.path, Path(folder, track.name), streams, "pcm_f32le")
        place, faults = replace(track.place, path=Path(folder, track.name), root=Path(folder)), []
        stems = {name: (Part(f"{name}.wav"),) for name in names}
        files = open_files(place, track.rate, stems, faults)
        raise_dataset_faults({track.path: faults})
        yield files


def _read(track: Track, stem: str, float32: bool) -> tuple[np.ndarray, int]:
    """Return (the samples of a stem, how many of those in its files were clipped)."""
    if not (parts := track.stems[stem]):
        return np.zeros((2, track.length), np.float32), 0
    files = [_read_file(track, track.folder / part.file, float32) for part in parts]
    signed = (
        audio if part.sign == 1 else -audio for part, (audio, _) in zip(parts, files, strict=True)
    )
    return reduce(np.add, signed), sum(count for _, count in files)


def _read_file(track: Track, path: Path, float32: bool) -> tuple[np.ndarray, int]:
    samples, unit = track.read_file(path, 0, -1)
    audio, kind = samples * unit, sf.info(os.fsencode(path)).subtype
    if float32 or kind == "PCM_16":
        return audio, 0
    # As ffmpeg converts for musdb: floats are rounded, longer integers lose their low bits.
    to_integer = np.rint if kind in ("FLOAT", "DOUBLE") else np.floor
    scaled = to_integer(audio.astype(np.float64) * 32768)
    on_grid = (np.clip(scaled, -32768, 32767) / 32768).astype(np.float32)
    return on_grid, int(np.count_nonzero(np.abs(audio) > 1))
