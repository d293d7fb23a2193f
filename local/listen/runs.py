"""What a run holds: scores of every frame, their records, saved estimates, facts."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
from local.tools.files import read_yaml
from local.tools.sound_files import read_header

MODEL_FACTS = ("causal", "norm_type")
TRAINING_FACTS = ("epochs", "segment", "loss")


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

    def find_conf(self) -> Path | None:
        """Return the conf.yml of the training run whose folder this one is in."""
        folders = Path(os.path.abspath(self.folder)).parents
        return next((f / "conf.yml" for f in folders if (f / "best_model.pth").is_file()), None)


def read_runs(folders: list[Path]) -> tuple[list[Run], int]:
    """Return (the runs, the sample rate of all estimates in Hz, or 0 where there are none).

    Raises:
        UserError: lists all faults of the folders and their files.
    """
    names, faults = name_runs(folders, taken=read_published()["run"].unique())
    raise_together(faults + read_score_table(names)[1])
    found = [read_run(name, folder) for name, folder in names.items()]
    runs = [run for run, _ in found]
    raise_together([fault for _, of_run in found for fault in of_run] + find_rate_faults(runs))
    return runs, next((rate for run in runs for rate in run.rates.values()), 0)


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


@dataclass(frozen=True)
class Player:
    """What can be heard of a track.

    Args:
        number: from 1 on; also its key and the name of its files.
        target: "" for the mixture.
        run: the name of the run whose estimate it is; "" for the data set's audio.
    """

    number: int
    target: str
    run: str

    @property
    def label(self) -> str:
        return self.run or ("reference" if self.target else "mixture")


def list_players(runs: list[Run], track: str, has_reference: bool) -> list[Player]:
    """Return the players of a track: the mixture, then per target its reference and the runs'
    estimates. A track without estimates has none.
    """
    has_reference = has_reference and any(track in run.estimates for run in runs)
    found = [("", "")] if has_reference else []
    for target in list_targets(runs, track):
        names = [run.name for run in runs if target in run.estimates.get(track, {})]
        references = [""] if has_reference and names else []
        found += [(target, name) for name in references + names]
    return [Player(number, *player) for number, player in enumerate(found, start=1)]


def describe_run(run: Run) -> dict[str, str]:
    """Return the facts of a run: what they are of -> text; "" where that is not known."""
    facts = {
        "folder": printable(run.folder),
        "tracks": str(len(run.scores)),
        "with audio": str(len(run.estimates)),
    }
    for fact in ("method", "segment", "overlap", "checkpoint", "precision", "scorer"):
        facts[fact] = _count(_find_made_with(record, fact) for record in run.records.values())
    facts["checkpoint"] = facts["checkpoint"][:12]  # the beginning of a SHA-256
    facts["recipe"] = _count(record.get("version") for record in run.records.values())
    return facts | _describe_training(run.find_conf())


def _find_made_with(record: dict, fact: str):
    made_with = record.get("made_with")
    return made_with.get(fact) if isinstance(made_with, dict) else None


def _count(values: Iterable) -> str:
    """Return the values as text, with their counts where there are several."""
    counts = Counter(str(value) for value in values if value is not None)
    if len(counts) < 2:
        return "".join(counts)
    return ", ".join(f"{value} ({plural(count, 'track')})" for value, count in counts.items())


def _describe_training(conf_file: Path | None) -> dict[str, str]:
    if conf_file is None or not conf_file.is_file():
        return {}
    conf = read_yaml(conf_file)
    sections = {
        key: value
        for part in conf.values()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    facts = {key: sections[key] for key in (*MODEL_FACTS, *TRAINING_FACTS) if key in sections}
    names = {"segment": "segment of training"}
    return {names.get(key, key): str(value) for key, value in facts.items()}


def find_notes(runs: list[Run]) -> list[str]:
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
