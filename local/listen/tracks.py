"""The page of a track: its players with their files, and the scores over time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from local.eval.score_files import METRICS
from local.eval.tracks import TestTrack, read_track
from local.listen.analysis import (
    Analysis,
    analyse,
    find_loudest,
    match_loudness,
)
from local.listen.audio import encode, read_audio
from local.listen.charts import (
    choose_range,
    choose_ticks,
    draw_line,
    draw_waveform,
    find_passages,
)
from local.listen.overview import Overview
from local.listen.runs import Player, list_players, list_targets
from local.tools.command_line import UserError

FRAME_METRICS = ("SDR", "SIR", "SAR")  # drawn over time
MOST_TICKS = 12
LOUD_SHARE = 0.995  # of the columns of a waveform are within its picture
MEL_RANGE = 80  # dB, from black to white


@dataclass(frozen=True)
class Options:
    """What a page holds.

    Args:
        audio: one of audio.FORMATS.
        excerpt: seconds of audio of each track; None for all of it.
        with_references: whether the data set's audio is in it.
    """

    audio: str = "flac"
    excerpt: int | None = None
    with_references: bool = True


@dataclass(frozen=True)
class TrackPlan:
    """A track of the page.

    Args:
        number: from 1 on; also the name of its files.
        reference: where the data set's audio is read from; None where it is not in the page.
        rate: of its audio, in Hz.
    """

    number: int
    name: str
    overview: Overview
    reference: TestTrack | None
    rate: int

    @property
    def targets(self) -> list[str]:
        return list_targets(self.overview.runs, self.name)

    @property
    def players(self) -> list[Player]:
        return list_players(self.overview.runs, self.name, self.reference is not None)

    def read_signals(self) -> dict[tuple[str, str], Callable[[], np.ndarray]]:
        """Return (target, run) of each player -> what reads its samples (2, T)."""
        readers = {}
        if self.reference:
            audio, _ = read_track(self.reference, with_stems=len(self.targets) > 2)
            readers |= {("", ""): lambda: audio["mixture"]}
            readers |= {(t, ""): lambda t=t: audio[t] for t in self.targets if t in audio}
        for run in self.overview.runs:
            for target, file in run.estimates.get(self.name, {}).items():
                readers[target, run.name] = lambda file=file: read_audio(file)
        return readers


def write_track(plan: TrackPlan, folder: Path, options: Options) -> dict:
    """Write the audio and the pictures of a track into folder/NUMBER.

    Returns:
        what the template track.html takes.

    Raises:
        UserError: audio cannot be read.
        OSError: a file cannot be written.
    """
    players = plan.players
    analyses, start, seconds = {}, 0, 0.0
    if players:
        files = folder / str(plan.number)
        files.mkdir()
        analyses, start, seconds = write_audio(plan, players, files, options)
        draw_spectrograms(analyses, files)
    window = slice(start, start + int(np.ceil(seconds)) if seconds else None)
    return {
        "number": plan.number,
        "name": plan.name,
        "start": start,
        "seconds": seconds or count_frames(plan),
        "players": describe_players(players, analyses, plan.number, options),
        "charts": [chart_target(plan, target, window) for target in plan.targets],
        "scores": [row for target in plan.targets for row in list_scores(plan, target, window)],
        "track_notes": list_notes(plan, start, seconds),
    }


def write_audio(
    plan: TrackPlan, players: list[Player], files: Path, options: Options
) -> tuple[dict[Player, Analysis], int, float]:
    """Return (player -> what is shown of it, where the audio begins in the track, its length), in
    seconds.
    """
    try:
        readers = plan.read_signals()
    except ValueError as error:
        raise UserError(f"{plan.name}: {error}") from None
    start = choose_start(players, readers, plan.rate, options.excerpt)
    analyses, seconds = {}, 0.0
    for player in players:
        samples = readers[player.target, player.run]()
        if options.excerpt:
            samples = samples[:, start * plan.rate :][:, : options.excerpt * plan.rate]
        seconds = max(seconds, samples.shape[1] / plan.rate)
        data = encode(samples, plan.rate, options.audio)
        (files / f"{player.number}.{options.audio}").write_bytes(data)
        analyses[player] = analyse(samples, plan.rate)
    return analyses, start, seconds


def choose_start(players: list[Player], readers: dict, rate: int, excerpt: int | None) -> int:
    """Return where the excerpt begins: the loudest passage of the first vocals, or else of the
    first player.
    """
    if not excerpt:
        return 0
    first = next((p for p in players if p.target == "vocals"), players[0])
    return find_loudest(readers[first.target, first.run](), rate, excerpt)


def draw_spectrograms(analyses: dict[Player, Analysis], files: Path) -> None:
    """Write NUMBER.png for each player: columns over time, low frequencies at the bottom."""
    from matplotlib.image import imsave  # takes a second to import

    highest = max(float(analysis.mel.max()) for analysis in analyses.values())
    for player, analysis in analyses.items():
        limits = {"vmin": highest - MEL_RANGE, "vmax": highest}
        path = files / f"{player.number}.png"
        imsave(path, analysis.mel, cmap="magma", origin="lower", format="png", **limits)


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
    return notes


def chart_target(plan: TrackPlan, target: str, window: slice) -> dict:
    """Return the charts of a target: a line per run in each of FRAME_METRICS.

    Args:
        window: the seconds that are shown.
    """
    frames = {
        run.name: {m: run.scores[plan.name][target][m][window] for m in FRAME_METRICS}
        for run in plan.overview.runs
        if target in run.scores.get(plan.name, {})
    }
    mixtures = [run.mixture(plan.name, target) for run in plan.overview.runs]
    mixture = next((dB for dB in mixtures if np.isfinite(dB)), None)
    metrics = [draw_metric(metric, frames, mixture) for metric in FRAME_METRICS]
    return {"target": target, "metrics": metrics}


def draw_metric(metric: str, frames: dict, mixture: float | None) -> dict:
    low, high = choose_range(of_run[metric] for of_run in frames.values())
    return {
        "metric": metric,
        "range": (low, high),
        "ticks": choose_ticks(low, high, 4),
        "mixture": mixture if metric == "SDR" and mixture and low <= mixture <= high else None,
        "lines": {
            name: draw_line(np.clip(of_run[metric], low, high)) for name, of_run in frames.items()
        },
    }


def list_scores(plan: TrackPlan, target: str, window: slice) -> Iterator[dict]:
    """Yield the rows of a target: the mixture, the runs with their worst and best passage in the
    window, the published models.
    """
    runs = [run for run in plan.overview.runs if target in run.scores.get(plan.name, {})]
    mixtures = [run.mixture(plan.name, target) for run in runs]
    mixture = next((dB for dB in mixtures if np.isfinite(dB)), np.nan)
    players = {(p.target, p.run): p.number for p in plan.players}

    def make_row(name: str, cells: dict, **more) -> dict:
        row = {"target": target, "name": name, "cells": cells, "gain": cells["SDR"] - mixture}
        return {**row, "passages": {}, "player": None, "published": False, **more}

    yield make_row("mixture", {"SDR": mixture}, gain=np.nan)
    for run in runs:
        cells = {metric: run.median(plan.name, target, metric) for metric in METRICS}
        found = find_passages(run.scores[plan.name][target]["SDR"][window])
        passages = {kind: (window.start + first, mean) for kind, (first, mean) in found.items()}
        yield make_row(run.name, cells, passages=passages, player=players.get((target, run.name)))
    for name, sdr in plan.overview.published_sdr(plan.name, target).items():
        if np.isfinite(sdr):
            yield make_row(name, {"SDR": sdr}, published=True)
