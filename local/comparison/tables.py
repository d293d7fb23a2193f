"""The text of comparison.txt."""

import re
from pathlib import Path

import pandas as pd

from local.comparison.runs import find_method_notes, printable
from local.comparison.statistics import STATISTICS
from local.eval.score_files import METRICS, order_targets
from local.tools.command_line import plural

PUBLISHED_ORIGIN = (
    "published, not computed here: SDR of whole tracks at once, comparable with eval.py"
    " --method full"
)


def describe(runs: dict[str, Path], scores: pd.DataFrame, differences: pd.DataFrame) -> str:
    """Return the text of comparison.txt."""
    names, targets = scores["run"].unique(), order_targets(scores["target"])
    lines = align([[name, printable(runs.get(name, PUBLISHED_ORIGIN))] for name in names], left=2)
    if notes := method_notes(runs, scores):
        lines += ["", *notes]
    lines += ["", "Medians over tracks of the median over frames, in dB; last the mean over tracks"]
    for target in targets:
        lines += ["", *summary_table(scores, target)]
    if notes := find_notes(scores):
        lines += ["", *notes]
    if len(names) > 1:
        lines += ["", f"Paired differences to the baseline, the first RUN: {names[0]}, in dB"]
        lines.append(
            "(above 0: better than it; tracks that both have; 95 % by bootstrap over tracks)"
        )
        for target in targets:
            lines += ["", *difference_table(differences, target, names[0])]
    lines += ["", "SDR of every track in dB, median over frames (-: not in this run)"]
    for target in targets:
        lines += ["", *track_table(scores, target)]
    return "\n".join(lines) + "\n"


def method_notes(runs: dict[str, Path], scores: pd.DataFrame) -> list[str]:
    """Return what the methods make incomparable, of the runs and published scores in the table."""
    return find_method_notes(runs, with_published=bool(set(scores["run"]) - set(runs)))


def summary_table(scores: pd.DataFrame, target: str) -> list[str]:
    of_target = scores[scores["target"] == target]
    sdr = of_target[of_target["metric"] == "SDR"]
    medians = of_target.groupby(["run", "metric"])["median"].median().to_dict()
    rows = [[target, "tracks", *METRICS, "NaN frames", "mean SDR"]]
    for run in scores["run"].unique():
        tracks = sdr[sdr["run"] == run]
        shown = [cell(medians.get((run, metric)), ".3f") for metric in METRICS]
        # The published scores do not have it.
        nan_share = (tracks["frames"] * tracks["nan_share"]).sum(min_count=1)
        share = cell(nan_share / tracks["frames"].sum(min_count=1), ".1%")
        mean = cell(tracks["median"].mean(), ".3f")
        rows.append([run, str(tracks["median"].count()), *shown, share, mean])
    return align(rows)


def cell(value: float | None, form: str) -> str:
    return "-" if pd.isna(value) else f"{value:{form}}"


def align(rows: list[list[str]], left: int = 1) -> list[str]:
    """Return the lines of a table: `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<"] * left + [">"] * (len(widths) - left)
    forms = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    return [
        "  ".join(f"{text:{form}}" for text, form in zip(row, forms, strict=True)).rstrip()
        for row in rows
    ]


def find_notes(scores: pd.DataFrame) -> list[str]:
    """Return what makes medians of the runs incomparable, a line each."""
    sdr = scores[scores["metric"] == "SDR"]
    notes = [
        f"{row.target}: no frame of {row.track} has a score in {row.run}, so no median counts it"
        for row in sdr[sdr["median"].isna()].itertuples()
    ]
    differing: dict[str, list[str]] = {}  # how the tracks of runs differ -> of which targets
    for target in order_targets(sdr["target"]):
        of_target = sdr[sdr["target"] == target]
        held = of_target.dropna(subset="median").groupby("run", sort=False)["track"].agg(frozenset)
        if held.nunique() > 1:
            differing.setdefault(_describe_tracks(held, sdr["run"].iloc[0]), []).append(target)
        uneven = (of_target.groupby("track")["nan_share"].nunique() > 1).sum()
        if uneven:
            notes.append(
                f"{target}: in {plural(uneven, 'track')} the runs have scores of different frames;"
                " museval gives none where any of the targets it scores together is silent"
            )
    return notes + [f"{', '.join(targets)}: {text}" for text, targets in differing.items()]


def _describe_tracks(held: pd.Series, baseline: str) -> str:
    """Return how the tracks of runs differ.

    Args:
        held: run -> the tracks that have a score.
    """
    shared = frozenset.intersection(*held)
    paired = [held[run] & held.get(baseline, shared) for run in held.index if run != baseline]
    text = f"{', '.join(held.index)} hold different tracks, {len(shared)} of them in all; medians"
    text += " over different tracks are not comparable"
    if any(paired):
        return f"{text}, paired differences are"
    text += f", and there are no paired differences: no other run has a track of {baseline}"
    # eval.py calls tracks "NAME (ROOT)" where several roots have NAME.
    own_names = [{re.sub(r" \([^()]+\)$", "", name) for name in names} for names in held]
    if same := sorted(set.intersection(*own_names)):
        text += f"; some call {same[0]} {same[0]} (ROOT): run eval.py with the same --root"
    return text


def difference_table(differences: pd.DataFrame, target: str, baseline: str) -> list[str]:
    rows = [[target, "", "tracks", "mean", "95 %", "median", "95 %"]]
    for row in differences[differences["target"] == target].to_dict("records"):
        shown = []
        for name in STATISTICS:
            low, high = (cell(row[f"{name}_{end}"], "+.2f") for end in ("low", "high"))
            shown += [cell(row[name], "+.2f"), "-" if low == "-" else f"[{low}, {high}]"]
        rows.append([row["run"], row["metric"], str(row["tracks"]), *shown])
    if len(rows) == 1:
        return [f"{target}: nothing to pair, {baseline} or all others have no score of it"]
    return align(rows, left=2)


def track_table(scores: pd.DataFrame, target: str) -> list[str]:
    sdr = scores[(scores["target"] == target) & (scores["metric"] == "SDR")]
    shown = sdr.assign(shown=sdr["median"].map("{:.2f}".format))
    cells = shown.pivot(index="track", columns="run", values="shown").fillna("-")
    cells = cells[sdr["run"].unique()]
    return align([[target, *cells.columns], *map(list, cells.itertuples())])
