"""The page of a track: its players, and the scores over time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from local.eval.score_files import METRICS
from local.listen.analysis import Analysis, match_loudness
from local.listen.audio import LAST_BLOCKS
from local.listen.charts import (
    choose_range,
    choose_ticks,
    draw_line,
    draw_waveform,
    find_passages,
)
from local.listen.players import Player
from local.listen.published import link_card
from local.listen.runs import find_mixture
from local.listen.signals import Options, TrackPlan, draw_spectrograms, write_audio
from local.tools.command_line import plural

KINDS = ("worst", "best")  # of passages
MOST_TICKS = 12
LOUD_SHARE = 0.995  # of the columns of a waveform are within its picture


def write_track(plan: TrackPlan, folder: Path, options: Options) -> dict:
    """Write the audio and the pictures of a track into folder/NUMBER.

    Returns:
        what the template track.html takes.

    Raises:
        UserError: audio cannot be read.
        OSError: a file cannot be written.
    """
    players = plan.players
    analyses, clipped, start, seconds = {}, {}, 0, 0.0
    if players:
        files = folder / str(plan.number)
        files.mkdir()
        analyses, clipped, start, seconds = write_audio(plan, players, files, options)
        draw_spectrograms(analyses, files)
    window = slice(start, start + int(np.ceil(seconds)) if seconds else None)
    return {
        "number": plan.number,
        "name": plan.name,
        "start": start,
        "seconds": seconds or count_frames(plan),
        "last": max(0, seconds - LAST_BLOCKS / plan.rate) if players else 0,
        "players": describe_players(players, analyses, plan.number, options),
        "charts": [chart_target(plan, target, window) for target in plan.targets],
        **describe_scores(plan, window),
        "track_notes": list_notes(plan, start, seconds) + list_clipped(clipped),
    }


def describe_players(
    players: list[Player], analyses: dict[Player, Analysis], track: int, options: Options
) -> list[dict]:
    gains = match_loudness([analyses[player].loudness for player in players])
    # Of all waveforms of the track, so that they can be compared; a single click may be beyond.
    highest = [np.quantile(np.abs(a.peaks), LOUD_SHARE) for a in analyses.values()]
    full_scale = float(max(highest, default=1))
    return [
        {
            "number": player.number,
            "target": player.target,
            "run": player.run,
            "label": player.label,
            "audio": f"{track}/{player.number}.{options.audio}",
            "picture": f"{track}/{player.number}.png",
            "columns": len(analyses[player].peaks),
            "waveform": draw_waveform(analyses[player].peaks, full_scale),
            "loudness": analyses[player].loudness,
            "gain": gain,
        }
        for player, gain in zip(players, gains, strict=True)
    ]


def count_frames(plan: TrackPlan) -> int:
    """Return the frames of 1 s that have scores."""
    scores = [run.scores.get(plan.name, {}) for run in plan.overview.runs]
    return max(len(metrics["SDR"]) for targets in scores for metrics in targets.values())


def list_notes(plan: TrackPlan, start: int, seconds: float) -> list[str]:
    """Return what a listener should know of the audio of the track."""
    notes = []
    for run in plan.overview.runs:
        if plan.name in run.scores and plan.name not in run.estimates:
            notes.append(f"{run.name}: no saved estimates of this track, so scores alone")
        elif plan.name not in run.scores:
            notes.append(f"{run.name}: does not have this track")
    if start or 0 < seconds < count_frames(plan) - 1:
        shown = f"an excerpt of {seconds:.0f} s from {start} s on"
        notes.append(f"{shown}; medians are over the whole track, passages are in the excerpt")
    published = [plan.overview.published_sdr(plan.name, t).values() for t in plan.targets]
    if plan.overview.method_note and np.isfinite([*map(list, published)]).any():
        notes.append(plan.overview.method_note)
    return notes


def list_clipped(clipped: dict[Player, int]) -> list[str]:
    """Return which players do not have all of their signal, a line each."""
    return [
        f"{player.label}, {player.target or 'mixture'}: {plural(count, 'sample')} beyond full scale"
        " clipped in the audio of this page"
        for player, count in clipped.items()
        if count
    ]


def chart_target(plan: TrackPlan, target: str, window: slice) -> dict:
    """Return the charts of a target: a line per run in each metric.

    Args:
        window: the seconds that are shown.
    """
    frames = {
        run.name: {m: run.scores[plan.name][target][m][window] for m in METRICS}
        for run in plan.overview.runs
        if run.has(plan.name, target)
    }
    mixture = find_mixture(plan.overview.runs, plan.name, target)
    metrics = [draw_metric(metric, frames, mixture) for metric in METRICS]
    return {"target": target, "metrics": metrics}


def draw_metric(metric: str, frames: dict, mixture: float) -> dict:
    """Return a chart of a metric, with the mixture's SDR where it is one of SDR and holds it.

    Args:
        frames: run -> metric -> dB of every second that is shown.
    """
    low, high = choose_range(of_run[metric] for of_run in frames.values())
    return {
        "metric": metric,
        "range": (low, high),
        "ticks": choose_ticks(low, high, 4),
        "mixture": mixture if metric == "SDR" and low <= mixture <= high else None,
        "lines": {
            name: draw_line(np.clip(of_run[metric], low, high)) for name, of_run in frames.items()
        },
    }


def describe_scores(plan: TrackPlan, window: slice) -> dict:
    """Return the rows of the table of scores, what its columns need, and the published models."""
    rows = [row for target in plan.targets for row in list_scores(plan, target, window)]
    is_paired = any(np.isfinite(row["difference"]) for row in rows)
    shown = dict.fromkeys(row["name"] for row in rows)
    return {
        "scores": rows,
        "baseline": plan.overview.runs[0].name if is_paired else "",
        "kinds": [kind for kind in KINDS if any(kind in row["passages"] for row in rows)],
        "cards": [link_card(name) for name in shown if name in plan.overview.published],
    }


def list_scores(plan: TrackPlan, target: str, window: slice) -> Iterator[dict]:
    """Yield the rows of a target: the mixture, the runs with their worst and best passage in the
    window, the published models. What does not compare has no gain and no difference.
    """
    overview = plan.overview
    mixture = find_mixture(overview.runs, plan.name, target)
    first = overview.runs[0].median(plan.name, target)
    methods = overview.show_methods(plan.name)
    players = {(p.target, p.run): p.number for p in plan.players}

    def make_row(name: str, cells: dict, **more) -> dict:
        row = {"target": target, "name": name, "method": methods.get(name, ""), "cells": cells}
        row |= {"gain": cells["SDR"] - mixture, "difference": cells["SDR"] - first}
        return {**row, "passages": {}, "player": None, **more}

    yield make_row("mixture", {"SDR": mixture}, gain=np.nan, difference=np.nan)
    for run in [run for run in overview.runs if run.has(plan.name, target)]:
        cells = {metric: run.median(plan.name, target, metric) for metric in METRICS}
        found = find_passages(run.scores[plan.name][target]["SDR"][window])
        passages = {kind: (window.start + first, mean) for kind, (first, mean) in found.items()}
        row = make_row(run.name, cells, passages=passages, player=players.get((target, run.name)))
        yield row if run is not overview.runs[0] else {**row, "difference": np.nan}
    unknown = {} if overview.has_comparable else {"gain": np.nan, "difference": np.nan}
    for name, sdr in overview.published_sdr(plan.name, target).items():
        if np.isfinite(sdr):
            yield make_row(name, {"SDR": sdr}, **unknown)
