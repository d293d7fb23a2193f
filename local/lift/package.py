"""The challenge's metadata: which segment of which song a listener is to hear, and how."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf

from local.lift.listener import Listener, is_number, make_listener, read_json
from local.tools.command_line import UserError, raise_together, suggest
from local.tools.sound_files import read_header

RATE, MIXTURE = 44100, "mixture.flac"  # of each song

MOST_FAULTS = 20  # that are shown


class Segment(NamedTuple):
    name: str
    file: Path
    start: int  # in samples
    stop: int

    def read(self) -> np.ndarray:
        """(2, T)."""
        file = os.fsencode(self.file)
        samples, _ = sf.read(file, start=self.start, stop=self.stop, dtype="float32")
        return samples.T


class Pair(NamedTuple):
    """What a listener is to hear of a scene."""

    scene: str
    listener: str
    compressor: Listener
    alpha: float  # as the metadata write it, which is part of the name of a file

    @property
    def file(self) -> str:
        return f"{self.scene}_{self.listener}_A{self.alpha}_remix.flac"


def read_pairs(metadata: Path, music: Path, split: str) -> dict[Segment, list[Pair]]:
    """Read the pairs of scenes and listeners of a split, by segment.

    Args:
        metadata: the folder of the JSON files.
        music: the folder that the paths in them start from.

    Raises:
        UserError: a file cannot be read; or they do not fit together, or songs are missing or too
            short: all such faults.
    """
    package, pairs, faults = Package(metadata, music, split), {}, {}

    def attempt(look_up, name):
        try:
            return look_up(name)
        except ValueError as error:
            faults.setdefault(str(error))  # of many scenes, once
            return None

    for scene in package.scenes:
        segment = attempt(package.find_segment, scene)
        alpha = attempt(package.find_alpha, scene)
        for name in attempt(package.list_listeners, scene) or ():
            compressor = attempt(package.find_compressor, name)
            if segment and compressor and alpha is not None:
                pairs.setdefault(segment, []).append(Pair(scene, name, compressor, alpha))
    shown = list(faults)
    if len(shown) > MOST_FAULTS:
        shown[MOST_FAULTS:] = [f"and {len(shown) - MOST_FAULTS} more"]
    raise_together(shown)
    if not pairs:
        raise UserError(f"--scenes: {metadata} has no scenes of split {split}")
    return pairs


def check_song(segment: Segment) -> None:
    """Raise a ValueError where a segment cannot be cut from its song."""
    file = segment.file
    if not file.is_file():
        raise ValueError(f"--music: no such file: {file}, which {segment.name} names")
    try:
        info = read_header(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if (info.samplerate, info.channels) != (RATE, 2):
        found = f"{info.samplerate} Hz and {info.channels} channel(s)"
        raise ValueError(f"{file}: expected {RATE} Hz and 2 channels, got {found}")
    if info.frames < segment.stop:
        raise ValueError(f"{file}: ends after {info.duration:.2f} s, before {segment.name} does")


class Table:
    """A JSON file that holds entries by name."""

    def __init__(self, path: Path):
        self.entries, self._file = read_json(path), path.name

    def find(self, name: str, wanted_by: str):
        """Raises ValueError where there is no such entry."""
        if name not in self.entries:
            near = suggest(str(name), self.entries)
            raise ValueError(f"{self._file} has no {name}, which {wanted_by} names{near}")
        return self.entries[name]


def read_tables(files: list[Path]) -> list[Table]:
    """Raises a UserError of all that cannot be read."""
    tables, faults = [], []
    for file in files:
        try:
            tables.append(Table(file))
        except UserError as error:
            faults.append(str(error))
    raise_together(faults)
    return tables


class Package:
    """The files of a split. What is looked up there and wrong is a ValueError."""

    def __init__(self, metadata: Path, music: Path, split: str):
        self._folder = music
        parts = "scene", "music", "scene_listeners", "compressor_params"
        files = [metadata / f"{part}.{split}.json" for part in parts]
        tables = read_tables([*files, metadata / "alpha.json"])
        self._scenes, self._segments, self._listeners, self._compressors, self._alphas = tables

    @property
    def scenes(self) -> list[str]:
        return list(self._scenes.entries)

    def find_segment(self, scene: str) -> Segment:
        name = self._find_key(scene, "segment_id")
        entry = self._segments.find(name, f"scene {scene}")
        try:
            start, stop = (float(entry[key]) for key in ("start_time", "end_time"))
            segment = Segment(
                name, self._folder / entry["path"] / MIXTURE, int(start * RATE), int(stop * RATE)
            )
        except (LookupError, TypeError, ValueError, OverflowError):
            needed = "path, start_time and end_time in seconds"
            raise ValueError(f"music: {name} must have {needed}, got {entry}") from None
        if not 0 <= segment.start < segment.stop:
            raise ValueError(f"music: {name} must end after it starts, got {start} to {stop} s")
        check_song(segment)
        return segment

    def find_alpha(self, scene: str) -> float:
        name = self._find_key(scene, "alpha")
        alpha = self._alphas.find(name, f"scene {scene}")
        if not is_number(alpha) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha.json: {name} must be from 0 to 1, got {alpha}")
        return alpha

    def list_listeners(self, scene: str) -> list[str]:
        names = self._listeners.find(scene, "the file of scenes")
        if not isinstance(names, list) or not names:
            raise ValueError(f"scene_listeners: {scene} must have a list of names, got {names}")
        for name in (scene, *names):
            if not isinstance(name, str) or "/" in name:
                raise ValueError(f"scene_listeners: {scene} {name} cannot be the name of a file")
        return names

    def find_compressor(self, listener: str) -> Listener:
        entry = self._compressors.find(listener, "scene_listeners")
        try:
            return make_listener(entry)
        except ValueError as error:
            raise ValueError(f"compressor_params: {listener}: {error}") from None

    def _find_key(self, scene: str, key: str) -> str:
        entry = self._scenes.entries[scene]
        if not isinstance(entry, dict) or key not in entry:
            raise ValueError(f"scene: {scene} has no {key}")
        return entry[key]
