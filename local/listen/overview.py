"""What index.html shows: facts, medians, box plots, differences, the tables of tracks."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from local.comparison.runs import find_method_notes, read_published
from local.comparison.statistics import interval, paired_differences
from local.comparison.tables import find_notes as find_score_notes
from local.eval.score_files import METRICS
from local.listen.charts import (
    SPARK_POINTS,
    choose_range,
    choose_ticks,
    describe_box,
    draw_sparks,
    find_passages,
)
from local.listen.facts import describe_run
from local.listen.players import list_players
from local.listen.published import METHOD, describe_methods, is_comparable, link_card
from local.listen.runs import Run, find_mixture, list_targets, list_tracks


@dataclass(frozen=True)
class Overview:
    """The runs of a page, and the published scores of their tracks.

    Args:
        scores: see `comparison.runs.read_runs`, with the published ones.
        published: the names of the published models that share a track.
    """

    runs: list[Run]
    scores: pd.DataFrame
    published: list[str]

    @property
    def names(self) -> list[str]:
        return [*(run.name for run in self.runs), *self.published]

    @property
    def method_note(self) -> str:
        """What the published scores do not compare with; "" where that is nothing."""
        return describe_methods(self.runs) if self.published else ""

    @property
    def has_comparable(self) -> bool:
        """Whether the published scores are comparable with those of the first run."""
        return is_comparable(self.runs[0])

    @property
    def comparable_scores(self) -> pd.DataFrame:
        """The scores without the published ones where these differ in their method."""
        table = self.scores
        return table if self.has_comparable else table[~table["run"].isin(self.published)]

    def show_methods(self, track: str | None = None) -> dict[str, str]:
        """Return run -> how a track, or all, were separated; "" where that is not known."""
        methods = {run.name: ", ".join(run.find_methods(track)) for run in self.runs}
        return methods | dict.fromkeys(self.published, METHOD)

    def values(self, name: str, target: str, metric: str) -> np.ndarray:
        """Return the medians over frames of the tracks that have one, in dB."""
        table = self.scores
        wanted = (table["run"] == name) & (table["target"] == target) & (table["metric"] == metric)
        return table.loc[wanted, "median"].dropna().to_numpy()

    def published_sdr(self, track: str, target: str) -> dict[str, float]:
        """Return model -> published SDR of a track; NaN where it is not published."""
        table = self.scores
        found = table[(table["track"] == track) & (table["target"] == target)]
        sdr = found[found["metric"] == "SDR"].set_index("run")["median"]
        return {name: float(sdr.get(name, np.nan)) for name in self.published}


def make_overview(runs: list[Run], scores: pd.DataFrame) -> Overview:
    """Join the runs, and their scores as a table, with the published ones that they share."""
    shared = read_published().merge(scores[["track", "target"]].drop_duplicates())
    both = pd.concat([scores, shared], ignore_index=True) if len(shared) else scores
    return Overview(runs, both, list(shared["run"].unique()))


def describe_overview(overview: Overview, with_references: bool) -> dict:
    """Return what the template index.html takes, without the options of the page."""
    runs, targets = overview.runs, list_targets(overview.runs)
    folders = {run.name: run.folder for run in runs}
    facts = [describe_run(run) for run in runs]
    kinds = dict.fromkeys(kind for of_run in facts for kind, value in of_run.items() if value)
    notes = [*filter(None, [overview.method_note]), *find_method_notes(folders, False)]
    differences = paired_differences(overview.comparable_scores)
    return {
        "names": overview.names,
        "published": overview.published,
        "cards": [link_card(name) for name in overview.published],
        "methods": overview.show_methods(),
        "has_comparable": overview.has_comparable,
        "facts": {kind: [of_run.get(kind, "") for of_run in facts] for kind in kinds},
        "notes_of_runs": notes + find_score_notes(overview.comparable_scores),
        "medians": {target: list_medians(overview, target) for target in targets},
        "boxes": {metric: list_boxes(overview, metric, targets) for metric in METRICS},
        "differences": differences.to_dict("records"),
        "tables": {t: list_rows(overview, t, with_references) for t in targets},
        "spark_points": SPARK_POINTS,
    }


def list_medians(overview: Overview, target: str) -> list[dict]:
    """Return a row per run: tracks, and metric -> (median over tracks, its 95 % interval)."""
    rows = []
    for name in overview.names:
        values = {metric: overview.values(name, target, metric) for metric in METRICS}
        cells = {
            metric: (float(np.median(dB)), *interval(dB, np.median)) if len(dB) else None
            for metric, dB in values.items()
        }
        rows.append({"name": name, "tracks": len(values["SDR"]), "cells": cells})
    return [row for row in rows if row["tracks"]]


def list_boxes(overview: Overview, metric: str, targets: list[str]) -> list[dict]:
    """Return a plot per target: on one axis in dB, a box per run that has the metric."""
    values = {
        target: {name: overview.values(name, target, metric) for name in overview.names}
        for target in targets
    }
    low, high = choose_range(dB for of_target in values.values() for dB in of_target.values())
    return [
        {
            "target": target,
            "range": (low, high),
            "ticks": choose_ticks(low, high, 6),
            "rows": [
                {"name": name, "box": describe_box(dB), "dots": np.clip(dB, low, high).tolist()}
                for name, dB in of_target.items()
                if len(dB)
            ],
        }
        for target, of_target in values.items()
    ]


def list_rows(overview: Overview, target: str, with_references: bool) -> list[dict]:
    """Return a row per track: the SDR of the mixture, of each run with its gain, its difference to
    the first and its course over time, the published SDR, and the worst passage of the first run
    with a link to it.
    """
    rows, first = [], overview.runs[0]
    for number, track in enumerate(list_tracks(overview.runs), start=1):
        mixture = find_mixture(overview.runs, track, target)
        sdr = [run.median(track, target) for run in overview.runs]
        having = [run for run in overview.runs if run.has(track, target)]
        frames = {run.name: run.scores[track][target]["SDR"] for run in having}
        players = list_players(overview.runs, track, with_references)
        sparks, spark_range = draw_sparks(frames)
        of_first = [p.number for p in players if (p.target, p.run) == (target, first.name)]
        rows.append(
            {
                "number": number,
                "name": track,
                "mixture": mixture,
                "runs": [(dB, dB - mixture) for dB in sdr],
                "differences": [dB - sdr[0] for dB in sdr[1:]],
                "published": overview.published_sdr(track, target),
                "sparks": sparks,
                "spark_range": spark_range,
                "passage": find_passages(frames.get(first.name, np.zeros(0))).get("worst"),
                "player": next(iter(of_first), None),
            }
        )
    return rows
