"""Which files of a track are which of its stems, and what is wrong with them."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from local.tools.choices import OTHER_SUFFIXES, SUFFIXES
from local.tools.command_line import UserError, raise_together, suggest
from local.tools.files import is_foreign
from local.tools.sound_files import read_header
from local.tracks.track import SOURCES, Part, Place, Track, raise_dataset_faults, sum_parts

# Names of the background of a karaoke pair; where several are there, the first is taken.
BACKGROUNDS = ("accompaniment", "instrumental", "no_vocals", "background")
NO_OTHERS = "no background and no other stem"
STEMS = (*SOURCES, "accompaniment", "mixture")  # which --stem_names may name


@dataclass(frozen=True)
class StemRules:
    """Which files are which stems: --suffix, --stem_names and --missing_stems.

    Args:
        suffixes: that files may have.
        names: stem -> the files, without suffix, that are summed to it.
        silent: whether a file that a track lacks is silence, and no fault.
    """

    suffixes: Sequence[str] = SUFFIXES
    names: dict[str, list[str]] = field(default_factory=dict)
    silent: bool = False

    @property
    def taken(self) -> list[str]:
        """The names of files that --stem_names gives to stems, in small letters."""
        return [name.casefold() for names in self.names.values() for name in names]


def read_rules(suffix: str, stem_names: str, missing_stems: str) -> StemRules:
    """The rules of the three flags. Raises a UserError that lists the faults of --stem_names."""
    suffixes = SUFFIXES if suffix == "auto" else (suffix,)
    return StemRules(suffixes, read_stem_names(stem_names), missing_stems == "silent")


def read_stem_names(text: str) -> dict[str, list[str]]:
    """Reads "vocals=lead,backing drums=drums"; names with spaces are quoted as in a shell."""
    try:
        words = shlex.split(str(text))
    except ValueError as error:
        raise UserError(f"--stem_names: {error}, in {text}") from None
    names, faults = {}, []
    for word in words:
        stem, _, files = word.partition("=")
        if not stem or not all(files.split(",")):
            faults.append(f"expected STEM=NAME or STEM=NAME,NAME, got {word!r}")
        elif stem not in STEMS:
            known = f"{', '.join(STEMS)}{suggest(stem, STEMS)}"
            faults.append(f"there is no stem {stem}, of {known}")
        elif stem in names:
            faults.append(f"{stem} is named twice; use {stem}=NAME,NAME")
        else:
            names[stem] = files.split(",")
    files = StemRules(names=names).taken
    faults += [
        f"{name} is named more than once; a file is part of one stem"
        for name in sorted({name for name in files if files.count(name) > 1})
    ]
    raise_together(faults, heading="--stem_names")
    return names


def open_tracks(
    places: Sequence[Place], rate: int, rules: StemRules, with_mixture: bool = False
) -> list[Track]:
    """The tracks in folders; checks the header of every file.

    Args:
        rate: the sampling rate, in Hz, that every file must have.
        with_mixture: whether they get a "mixture", which is the sum of the stems where there is no
            such file.

    Raises:
        DatasetError: lists what is wrong with the files.
    """
    tracks, faults = [], {place.root: [] for place in places}
    for place in places:
        tracks.append(_open_track(place, rate, rules, with_mixture, faults[place.root]))
    raise_dataset_faults(
        faults, {root: _find_remedies(root, rate, lines) for root, lines in faults.items()}
    )
    return tracks


def _find_remedies(root: Path, rate: int, faults: list[str]) -> list[str]:
    """What helps against all faults of a kind."""
    remedies = []
    if any("(--sample_rate)" in fault or "2 channels" in fault for fault in faults):
        command = f"python -m local.convert {shlex.quote(str(root))} OUT"
        remedies.append(f"{command} --sample_rate {rate} makes them stereo, at that rate")
    if any(NO_OTHERS in fault for fault in faults):
        names = f"{', '.join(BACKGROUNDS[:-1])} or {BACKGROUNDS[-1]}"
        remedies.append(
            f"the background of a karaoke pair is {names}, in wav or flac, or named by"
            " --stem_names accompaniment=NAME"
        )
    if any(fault.endswith(": missing") for fault in faults):
        remedies.append("--missing_stems silent takes silence for what is missing")
    return remedies


def _open_track(
    place: Place, rate: int, rules: StemRules, with_mixture: bool, faults: list[str]
) -> Track | None:
    """The track in a folder; or None, with what is wrong appended to `faults`."""
    try:
        finder = Finder(rules, sorted(os.listdir(place.path)))
    except OSError as error:
        faults.append(f"{place}: cannot be read: {error.strerror}")
        return None
    stems = finder.find_stems()
    if with_mixture:
        stems["mixture"] = finder.find("mixture", optional=True) or sum_parts(stems.values())
    faults += [f"{place}/{fault}" for fault in finder.faults]
    track = open_files(place, rate, stems, faults)
    if finder.faults or not track:
        return None
    return replace(track, unused=tuple(finder.unused))


class Finder:
    """Finds the files of the stems in the listing of a folder.

    Args:
        faults: what is wrong with them, each after the name of a file.
    """

    def __init__(self, rules: StemRules, listing: list[str]):
        self.rules, self.listing = rules, listing
        self.faults: list[str] = []

    def find_stems(self) -> dict[str, tuple[Part, ...]]:
        """Stem -> its parts, of a track of SOURCES or of a karaoke pair.

        Any of bass, drums and other makes a track of SOURCES.
        """
        if not any(map(self.has, SOURCES[1:])):
            if background := self.find_background():
                return {"vocals": self.find("vocals"), "accompaniment": background}
            if self.unused and not self.faults:
                self.faults.append(self._describe_unknown())
            if self.faults:
                return {"vocals": self.find("vocals")} if self.has("vocals") else {}
        if self.rules.silent and not any(map(self.has, SOURCES)):
            self.faults.append("vocals: missing, as are all other stems; remove the folder")
        return {stem: self.find(stem) for stem in SOURCES}

    @property
    def unused(self) -> list[str]:
        """The audio files in the folder that are nothing by their names."""
        names = (*STEMS, *BACKGROUNDS, *self.rules.taken)
        known = {file for name in names for file in self.match(name)}
        audio = (*(f".{suffix}" for suffix in SUFFIXES), *OTHER_SUFFIXES)
        return [
            file
            for file in self.listing
            if not (file in known or is_foreign(Path(file))) and file.casefold().endswith(audio)
        ]

    def _describe_unknown(self) -> str:
        """The fault of a folder whose files may be a background or stems of other names."""
        found = ", ".join(self.unused)
        if vocals := self.match("vocals"):
            return f"{vocals[0]}: {NO_OTHERS} beside it (found {found})"
        return (
            f"vocals: missing, as are all other stems (found {found}: see --suffix, --stem_names)"
        )

    def find_background(self) -> tuple[Part, ...]:
        """The parts of the background of a karaoke pair; none where there is none."""
        if self.has("accompaniment"):
            return self.find("accompaniment")
        names = [name for name in BACKGROUNDS if name not in self.rules.taken]
        if name := next(filter(self.match, names), None):
            return self.pick(name)
        if self.has("mixture") and self.has("vocals"):
            vocals = [Part(part.file, -part.sign) for part in self.find("vocals")]
            return (*self.find("mixture"), *vocals)
        return ()

    def has(self, stem: str) -> bool:
        """Whether any file of a stem is there."""
        return any(map(self.match, self.list_names(stem)))

    def list_names(self, stem: str) -> list[str]:
        """The names of the files of a stem, by --stem_names.

        A track that has none of them may have the stem under its own name, unless that is the
        name of a file of another stem.
        """
        names = self.rules.names.get(stem, [stem])
        is_own = self.match(stem) and stem not in self.rules.taken
        return [stem] if is_own and not any(map(self.match, names)) else names

    def find(self, stem: str, optional: bool = False) -> tuple[Part, ...]:
        """The parts of a stem."""
        return sum_parts(self.pick(name, optional) for name in self.list_names(stem))

    def pick(self, name: str, optional: bool = False) -> tuple[Part, ...]:
        """The file of a name; none, and a fault unless it is optional, where it is missing."""
        found = self.match(name)
        if len(found) == 1:
            return (Part(found[0]),)
        others = [
            file for file in self.listing if file.casefold().startswith(f"{name}.".casefold())
        ]
        shown = f"{name}.{' or .'.join(self.rules.suffixes)}"
        if found:
            self.faults.append(f"{shown}: {' and '.join(found)} are both there; remove all but one")
        elif others:
            self.faults.append(f"{shown}: missing (found {', '.join(others)}: see --suffix)")
        elif not (optional or self.rules.silent):
            near = f" (found {', '.join(self.unused)}: see --stem_names)" if self.unused else ""
            self.faults.append(f"{shown}: missing{near}")
        return ()

    def match(self, name: str) -> list[str]:
        """The files of a name, in any letters, with a suffix that is allowed."""
        wanted = {f"{name}.{suffix}".casefold() for suffix in self.rules.suffixes}
        return [file for file in self.listing if file.casefold() in wanted]


def open_files(
    place: Place, rate: int, stems: dict[str, tuple[Part, ...]], faults: list[str]
) -> Track | None:
    """The track of some stems; or None, with what is wrong with a file appended to `faults`."""
    known, lengths, rates = len(faults), {}, set()
    for name in dict.fromkeys(part.file for part in sum_parts(stems.values())):
        path, where = place.path / name, f"{place}/{name}"
        try:
            info = read_header(path)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            continue
        lengths[name] = info.frames
        rates.add(info.samplerate)
        if info.frames == 0:
            faults.append(f"{where}: no samples")
        if info.channels != 2:
            faults.append(f"{where}: expected 2 channels, got {info.channels}")
        if info.samplerate != rate:
            faults.append(f"{where}: expected {rate} Hz (--sample_rate), got {info.samplerate} Hz")
    if len(set(lengths.values())) > 1 and len(rates) == 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        faults.append(f"{place}: files of different lengths, in samples: {found}")
    if len(faults) > known:
        return None
    return Track(place, rate, max(lengths.values(), default=0), stems)
