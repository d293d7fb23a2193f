"""References and estimates of any targets, in folders of wav and flac files, for local.score."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from local.eval.scoring import Signals, plan_passes
from local.musdb18_tracks import TARGETS
from local.tools.choices import OTHER_SUFFIXES
from local.tools.command_line import plural, raise_together
from local.tools.files import is_foreign, stamp_files
from local.tools.sound_files import describe_fault, read_header
from local.tracks.roots import find_name_faults
from local.tracks.track import shorten_faults

SUFFIXES = (".wav", ".flac")

Files = dict[str, Path]  # target -> its file


@dataclass(frozen=True, eq=False)
class FolderTrack:
    """A track whose references and estimates are files.

    Args:
        references: with the mixture, where there is one.
        length: of the references, in samples.
    """

    name: str
    references: Files
    estimates: Files
    rate: int
    channels: int
    length: int

    @property
    def seconds(self) -> float:
        """How long it would be in stereo at 44.1 kHz: by that its memory is reckoned."""
        return self.length * self.channels / (2 * 44100)

    @property
    def files(self) -> list[Path]:
        return [*self.references.values(), *self.estimates.values()]

    def describe_files(self) -> dict[str, list[int]]:
        """Return the versions of its files by their names: see `stamp_files`."""
        kinds = {"references": self.references, "estimates": self.estimates}
        files = {f"{kind}/{f.name}": f for kind, of in kinds.items() for f in of.values()}
        return stamp_files(files)

    def read_signals(self) -> Signals:
        """Read the track. Estimates are cut, or padded with zeros, to the references' length.

        Raises:
            ValueError: a file cannot be read.
        """
        return Signals(
            self.rate,
            self._read_reference("mixture"),
            {target: self._read_reference(target) for target in self.estimates},
            {target: self._read(file) for target, file in self.estimates.items()},
        )

    def _read_reference(self, target: str) -> np.ndarray:
        """Read a reference; or sum those that give it, where it has no file."""
        files = sum_to(target, self.references)
        return sum((self._read(file) for file in files.values()), start=np.float32(0))

    def _read(self, file: Path) -> np.ndarray:
        """Read a file as (channels, length) float32."""
        try:
            audio, _ = sf.read(os.fsencode(file), self.length, dtype="float32", always_2d=True)
        except (OSError, sf.LibsndfileError):
            raise ValueError(f"{file}: {describe_fault(file)}") from None
        if audio.shape[1] != self.channels:
            raise ValueError(f"{file}: has {audio.shape[1]} channels now; it was changed")
        return np.pad(audio, [(0, self.length - len(audio)), (0, 0)]).T


def sum_to(target: str, references: Files) -> Files:
    """Return the references that sum to a target: its own file, or those of the stems.

    Without a file of their own, the accompaniment is the sum of all stems but the vocals, and the
    mixture the sum of all; of vocals and accompaniment where there are no other stems.
    """
    if target in references or target not in ("mixture", "accompaniment"):
        return {name: file for name, file in references.items() if name == target}
    stems = {name: file for name, file in references.items() if name != "mixture"}
    if stems.keys() - TARGETS:
        stems.pop("accompaniment", None)
    if target == "accompaniment":
        stems.pop("vocals", None)
    return stems


class Report:
    """What is wrong with the folders, and what the user should know, each with its tracks."""

    def __init__(self):
        self.faults: list[str] = []
        self.notes: dict[str, dict[str, None]] = {}  # text -> tracks, in order

    def note(self, text: str, track: str) -> None:
        self.notes.setdefault(text, {})[track] = None

    def describe_notes(self) -> list[str]:
        """Return a line per note: of how many tracks or files, and the first of them."""
        return [
            f"{text}: {len(tracks)}, first {next(iter(tracks))}"
            for text, tracks in self.notes.items()
        ]

    def raise_faults(self) -> None:
        raise_together(shorten_faults(self.faults))


def find_folder_tracks(references: Path, estimates: Path) -> tuple[list[FolderTrack], list[str]]:
    """Find the tracks that have estimates, sorted by name, and check the headers of their files.

    Args:
        references, estimates: folders of tracks, TRACK/TARGET.wav; or each the folder of one track,
            which then has the name of `references`.

    Returns:
        (the tracks, what the user should know about them, a line each).

    Raises:
        UserError: lists all faults.
    """
    report = Report()
    true = list_tracks(references, "REFERENCES", report)
    found = list_tracks(estimates, "ESTIMATES", report)
    if true and found and (None in true) != (None in found):
        flat, deep = (references, estimates) if None in true else (estimates, references)
        report.faults.append(
            f"{flat} is the folder of one track, {deep} a folder of tracks; name two of a kind"
        )
    report.raise_faults()
    report.faults += find_name_faults(filter(None, found))
    report.faults += [
        f"ESTIMATES: {folder_of(estimates, name)} has no track of this name in REFERENCES,"
        f" {references}; rename or remove it"
        for name in sorted(found.keys() - true.keys())
    ]
    for name in sorted(true.keys() - found.keys()):
        report.note("references without estimates, not scored", name)
    shared = sorted(found.keys() & true.keys(), key=str)
    single = os.path.basename(os.path.abspath(references))
    tracks = [open_track(name or single, true[name], found[name], report) for name in shared]
    report.raise_faults()
    return tracks, report.describe_notes()


def folder_of(root: Path, name: str | None) -> Path:
    return root / name if name else root


def list_tracks(root: Path, argument: str, report: Report) -> dict[str | None, Files]:
    """Return track -> its files; None -> the files in the folder itself, where it holds any."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not is_foreign(path))
        own = list_targets(root, report)
        tracks = {path.name: list_targets(path, report) for path in folders}
    except OSError as error:
        report.faults.append(f"{argument}: {error.filename or root}: {error.strerror}")
        return {}
    tracks = {None: own} if own else {name: files for name, files in tracks.items() if files}
    if not tracks:
        report.faults.append(
            f"{argument}: {root} holds no TRACK/TARGET.wav or .flac; name the folder of the tracks,"
            " such as MUSDB18/test"
        )
    return tracks


def list_targets(folder: Path, report: Report) -> Files:
    """Return the audio files of a folder by their targets."""
    files = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if is_foreign(path) or not path.is_file():
            continue
        if suffix in OTHER_SUFFIXES:
            report.note("files that are neither wav nor flac, not read", str(path))
        elif suffix in SUFFIXES and files.setdefault(path.stem, path) is not path:
            report.faults.append(f"{files[path.stem]} and {path.name}: remove one of them")
    return files


def open_track(
    name: str, references: Files, estimates: Files, report: Report
) -> FolderTrack | None:
    """Return a track, or None with what is wrong appended to the faults."""
    faults = find_name_faults(estimates)
    if "mixture" in estimates:
        report.note("estimates of the mixture, not scored", name)
    estimates = {target: file for target, file in estimates.items() if target != "mixture"}
    for target, file in estimates.items():
        parts = sum_to(target, references)
        if not parts:
            held = ", ".join(sorted(references))
            faults.append(f"{file}: no reference of {target}, only {held}; rename or remove it")
        elif target not in parts:
            report.note(f"{target} is compared with the sum of {', '.join(parts)}", name)
    for target in sorted(references.keys() - estimates.keys() - {"mixture", *TARGETS[1:]}):
        report.note(f"references of {target} without estimates, not scored", name)
    if "mixture" not in references:
        report.note(f"the mixture is the sum of {', '.join(sum_to('mixture', references))}", name)
    try:
        list(plan_passes(estimates))
    except ValueError as error:
        faults.append(f"{next(iter(estimates.values()), name)}: {error}")
    form = check_headers(name, references, estimates, report, faults)
    report.faults += faults
    return None if faults else FolderTrack(name, references, estimates, *form)


def check_headers(
    name: str, references: Files, estimates: Files, report: Report, faults: list[str]
) -> tuple[int, int, int] | None:
    """Return (rate, channels, length) of a track; append to the faults where its files differ."""
    infos = {}
    for file in (*references.values(), *estimates.values()):
        try:
            infos[file] = read_header(file)
        except ValueError as error:
            faults.append(f"{file}: {error}")
            continue
        if infos[file].frames == 0:
            faults.append(f"{file}: no samples")
    if faults:
        return None
    first, *others = infos
    rate, channels, length = infos[first].samplerate, infos[first].channels, infos[first].frames
    for file in others:
        info = infos[file]
        if (info.samplerate, info.channels) != (rate, channels):
            faults.append(
                f"{file}: expected {rate} Hz and {plural(channels, 'channel')} as of {first}, got"
                f" {info.samplerate} Hz and {info.channels}"
            )
        if info.frames != length and file in references.values():
            faults.append(
                f"{file}: expected {length} samples as of {first}, got {info.frames}; references of"
                " a track have one length"
            )
        elif info.frames != length:
            report.note("estimates of another length, cut or padded with zeros as by museval", name)
    return rate, channels, length
