"""The scores of runs and the published scores, as one table."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from local.eval.score_files import (
    FINAL_METRICS,
    METRICS,
    order_targets,
    read_method,
    read_scores,
    summarise,
)
from local.musdb18_tracks import UNFIT_FOR_NAMES
from local.tools.command_line import UserError, plural, suggest_path

PUBLISHED_FILE = Path(__file__).with_name("published_scores.csv")
# The published evaluation passes whole tracks through the model. "stream" gives the same numbers.
PUBLISHED_METHODS = ("full", "stream")
PUBLISHED_CARDS = {  # run -> its name on the hub
    "published non-causal": "cadenzachallenge/ConvTasNet_LyricsSeparation_NonCausal",
    "published causal": "cadenzachallenge/ConvTasNet_LyricsSeparation_Causal",
}
SUFFIXES = (".json", ".json.gz")
TRAINING_FILE = "best_k_models.json"  # of train.py, in EXP
MOST_DB = 10_000  # no ratio of two float64 numbers is larger


def name_runs(folders: list[Path], taken: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """Name each run by the shortest end of its path that no other run has; of what eval.py wrote
    into the folder of a training run, with the name of that folder.

    Args:
        taken: names that no run may have.

    Returns:
        (name -> folder, the faults: folders of the same run, a line each).
    """
    distinct, faults = {}, []
    for folder in folders:
        first = distinct.setdefault(os.path.realpath(scores_folder(folder)), folder)
        if first is not folder:
            faults.append(f"{folder}: the same run as {first}")
    # RUN/test is named as RUN is.
    paths = {folder: Path(os.path.abspath(folder)) for folder in distinct.values()}
    paths = {f: path.parent if path.name == "test" else path for f, path in paths.items()}
    others = [*paths.values(), *map(Path, taken)]
    return {short_name(path, others): folder for folder, path in paths.items()}, faults


def short_name(path: Path, others: list[Path]) -> str:
    parents = enumerate(path.parents, start=2)
    least = next((size for size, parent in parents if (parent / "best_model.pth").is_file()), 1)
    for size in range(least, len(path.parts) + 1):
        end = path.parts[-size:]
        if not any(other.parts[-size:] == end for other in others if other != path):
            break
    return printable(Path(*end))


def printable(path: Path | str) -> str:
    """Return a path as text, with control characters and bytes that are not UTF-8 escaped."""
    return UNFIT_FOR_NAMES.sub(lambda found: ascii(found[0])[1:-1], str(path))


def scores_folder(run: Path) -> Path:
    return run / "test" if (run / "test").is_dir() else run


def read_runs(runs: dict[str, Path]) -> tuple[pd.DataFrame, list[str]]:
    """Read the scores of all runs.

    Returns:
        (a row per run, track, target and metric: median and mean over frames in dB, NaN where no
        frame has a score; the number of frames; the share of frames without a score,
        the faults of the files, a line each).
    """
    rows, faults = [], []
    for run, folder in runs.items():
        try:
            files = find_scores(folder)
        except UserError as error:
            faults.append(str(error))
            continue
        for track, path in files.items():
            try:
                rows += [{"run": run, "track": track, **row} for row in read_track(path)]
            except ValueError as error:
                faults.append(str(error))
    columns = ["run", "track", "target", "metric", "median", "mean", "frames", "nan_share"]
    return pd.DataFrame(rows, columns=columns).astype({"frames": "Int64"}), faults


def find_scores(run: Path) -> dict[str, Path]:
    """Return track -> file of a run, sorted.

    Raises:
        UserError: the folder holds no scores, those of several runs, or a track twice.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder{suggest_path(run)}")
    folder = scores_folder(run)
    files = sorted(
        path for path in folder.rglob("[!.]*") if path.name.endswith(SUFFIXES) and not path.is_dir()
    )
    # That of eval.py is beside test/, where tracks are.
    files = [
        path for path in files if path.name != FINAL_METRICS or not (path.parent / "test").is_dir()
    ]
    below = sorted({path.parent.parent for path in files if path.parent.name == "test"})
    is_training_run = any(path.name == TRAINING_FILE for path in files)
    if not files or folder == run and (is_training_run or len(below) > 1):
        fault = "holds several runs" if len(below) > 1 else "holds no museval JSON"
        example = below[0] if below else "EXP/OUT"
        raise UserError(f"{run}: {fault}; name the folder that eval.py wrote, such as {example}")
    tracks, twice = {}, []
    for path in files:
        first = tracks.setdefault(track_name(path), path)
        if first is not path:
            twice.append(f"{first.relative_to(run)} and {path.relative_to(run)}")
    if twice:
        raise UserError(f"{run}: holds {plural(len(twice), 'track')} twice, first {twice[0]}")
    return tracks


def track_name(path: Path) -> str:
    return printable(path.name.removesuffix(".gz").removesuffix(".json"))


def read_track(path: Path) -> list[dict]:
    """Read the rows of a track, without run and track: see `read_runs`.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    scores = read_scores(path)
    frames = [values for metrics in scores.values() for values in metrics.values()]
    if not frames or any(x.ndim != 1 or not len(x) or (np.abs(x) > MOST_DB).any() for x in frames):
        raise ValueError(f"{path}: expected targets with scores in dB, or NaN, of some frames")
    rows = []
    for target, metrics in scores.items():
        for metric in METRICS:
            values = metrics[metric]
            row = {"target": target, "metric": metric, **summarise(values)}
            rows.append({**row, "frames": len(values), "nan_share": np.isnan(values).mean()})
    return rows


def read_published() -> pd.DataFrame:
    """Return the SDR of the published model cards as `read_runs` does; they give medians alone."""
    table = pd.read_csv(PUBLISHED_FILE).rename(columns={"SDR": "median"})
    return table.assign(run="published " + table.pop("model"), metric="SDR")


def find_method_notes(runs: dict[str, Path], with_published: bool = True) -> list[str]:
    """Return what the methods of separation make incomparable, a line each: runs and the published
    scores, and runs with one another.

    A run is known by the records of eval.py beside its scores; other systems have none.
    """
    notes, methods = [], {}
    for run, folder in runs.items():
        counts = Counter(map(read_method, find_scores(folder).values()))
        methods[run] = sorted(counts.keys() - {None})
        notes += [
            f"{run}: {plural(counts[method], 'track')} made with --method {method}, not comparable"
            " with the published scores; run eval.py --method full for that"
            for method in methods[run]
            if with_published and method not in PUBLISHED_METHODS
        ]
    used = set().union(*methods.values())
    if len(used) > 1 and used != set(PUBLISHED_METHODS):
        shown = "; ".join(f"{run} by {' and '.join(m)}" for run, m in methods.items() if m)
        notes.append(
            f"separated by different methods: {shown}; for models to be compared, run eval.py with"
            " the same --method"
        )
    return notes


def find_missing(scores: pd.DataFrame, targets: list[str]) -> list[str]:
    """Return the targets that no run has, and the runs with none of the targets, a line each."""
    found = ", ".join(order_targets(scores["target"]))
    faults = [
        f"--targets: no run has {target}; there are {found}"
        for target in targets
        if target not in set(scores["target"])
    ]
    for run, of_run in scores.groupby("run", sort=False)["target"]:
        if not set(targets) & set(of_run):
            held = ", ".join(order_targets(of_run))
            faults.append(f"--targets: {run} has none of them, only {held}")
    return faults
