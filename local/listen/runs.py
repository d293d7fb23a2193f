"""What a run holds: scores of every frame, their records, saved estimates, facts."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from local.comparison.runs import find_scores, name_runs, printable, read_published
from local.comparison.runs import read_runs as read_score_table
from local.eval.score_files import (
    DAMAGE,
    Scores,
    aggregate,
    order_targets,
    read_record,
    read_scores,
)
from local.tools.choices import SUFFIXES
from local.tools.command_line import plural, raise_together
from local.tools.sound_files import read_header


@dataclass(frozen=True)
class Run:
    """A run of eval.py, or the scores of another system.

    Args:
        folder: as it was named; it has TRACK/TARGET.wav beside test/TRACK.json.
        scores: track -> target -> metric -> dB of every frame.
        records: track -> what made its scores; {} for another system.
        estimates: track -> target -> file.
        rates: of the estimates' files, in Hz.
    """

    name: str
    folder: Path
    scores: dict[str, Scores]
    records: dict[str, dict]
    estimates: dict[str, dict[str, Path]]
    rates: dict[Path, int]

    def median(self, track: str, target: str, metric: str = "SDR") -> float:
        """Return the median over frames in dB; NaN where there is none."""
        frames = self.scores.get(track, {}).get(target, {}).get(metric, np.zeros(0))
        return float(aggregate(np.nanmedian, frames)) if len(frames) else np.nan

    def mixture(self, track: str, target: str) -> float:
        """Return the SDR of the mixture in dB, median over frames; NaN without a record."""
        try:
            return float(self.records[track]["mixture_SDR"][target]["median"])
        except DAMAGE:
            return np.nan

    def made_with(self, track: str, setting: str):
        """Return a setting that a track was separated with; None where no record says it."""
        settings = self.records.get(track, {}).get("made_with")
        return settings.get(setting) if isinstance(settings, dict) else None

    def find_methods(self, track: str | None = None) -> list[str]:
        """Return the methods by which a track, or all, were separated; [] where not known."""
        tracks = self.records if track is None else [track]
        found = (self.made_with(name, "method") for name in tracks)
        return sorted({str(method) for method in found if method is not None})

    def has(self, track: str, target: str) -> bool:
        return target in self.scores.get(track, {})

    def find_conf(self) -> Path | None:
        """Return the conf.yml of the training run whose folder this one is in."""
        folders = Path(os.path.abspath(self.folder)).parents
        return next((f / "conf.yml" for f in folders if (f / "best_model.pth").is_file()), None)


def read_runs(folders: list[Path]) -> tuple[list[Run], pd.DataFrame, int]:
    """Return (the runs, their scores: see `comparison.runs.read_runs`, the sample rate of all
    estimates in Hz, or 0 where there are none).

    Raises:
        UserError: lists all faults of the folders and their files.
    """
    names, faults = name_runs(folders, taken=read_published()["run"].unique())
    scores, score_faults = read_score_table(names)
    raise_together(faults + score_faults)
    found = [read_run(name, folder) for name, folder in names.items()]
    runs = [run for run, _ in found]
    raise_together([fault for _, of_run in found for fault in of_run] + find_rate_faults(runs))
    return runs, scores, next((rate for run in runs for rate in run.rates.values()), 0)


def read_run(name: str, folder: Path) -> tuple[Run, list[str]]:
    """Read a run, whose scores `comparison.runs.read_runs` found sound.

    Returns:
        (the run, the faults of its estimates, a line each).
    """
    scores, records, estimates, rates, faults = {}, {}, {}, {}, []
    for track, path in find_scores(folder).items():
        scores[track], records[track] = read_scores(path), read_record(path)
        out = path.parent.parent if path.parent.name == "test" else path.parent
        own_name = path.name.removesuffix(".gz").removesuffix(".json")
        found = find_estimates(out / own_name, scores[track])
        if found:
            estimates[track] = found
        for file in found.values():
            try:
                header = read_header(file)
            except ValueError as error:
                faults.append(f"{printable(file)}: {error}")
                continue
            rates[file] = header.samplerate
            if header.frames == 0:
                faults.append(f"{printable(file)}: no samples; run eval.py again")
    return Run(name, folder, scores, records, estimates, rates), faults


def find_estimates(folder: Path, targets: Iterable[str]) -> dict[str, Path]:
    """Return target -> FOLDER/TARGET.wav or .flac, of those that are there."""
    found = {}
    for target in order_targets(targets):
        files = [folder / f"{target}.{suffix}" for suffix in SUFFIXES if os.sep not in target]
        if file := next(filter(Path.is_file, files), None):
            found[target] = file
    return found


def list_tracks(runs: list[Run]) -> list[str]:
    return sorted(set().union(*(run.scores for run in runs)))


def list_targets(runs: list[Run], track: str | None = None) -> list[str]:
    """Return the targets that have scores, of one track or of all."""
    tracks = list_tracks(runs) if track is None else [track]
    return order_targets(t for run in runs for name in tracks for t in run.scores.get(name, ()))


def find_mixture(runs: list[Run], track: str, target: str) -> float:
    """Return the SDR of the mixture by the first run that has it; NaN where none has."""
    found = [run.mixture(track, target) for run in runs]
    return next((dB for dB in found if np.isfinite(dB)), np.nan)


def find_missing_audio(runs: list[Run]) -> list[str]:
    """Return which runs have no audio of which tracks, and what to run, a line each."""
    notes = []
    for run in runs:
        if lacking := len(run.scores) - len(run.estimates):
            count = f"{lacking} of {plural(len(run.scores), 'track')}"
            remedy = "eval.py --n_save_ex -1 saves those of all"
            notes.append(f"{run.name}: no saved estimates of {count}, so scores alone; {remedy}")
    return notes


def find_rate_faults(runs: list[Run]) -> list[str]:
    """Return a fault where estimates have different sample rates."""
    examples = {rate: file for run in runs for file, rate in run.rates.items()}
    if len(examples) < 2:
        return []
    shown = ", ".join(f"{printable(file)} has {rate} Hz" for rate, file in examples.items())
    return [f"mixed sample rates: {shown}; make a page for each, or evaluate the same data set"]
