"""The results over all tracks: results.txt, results.csv, results.pandas, final_metrics.json."""

import csv
import json
from pathlib import Path

import numpy as np

from local.eval.score_files import (
    AGGREGATES,
    FINAL_METRICS,
    METRICS,
    ScoredTrack,
    aggregate,
    make_track_store,
    order_targets,
    summarise,
)
from local.musdb18_tracks import TARGETS
from local.tools.files import atomic_path
from local.tools.museval_guard import import_museval

RESULTS = ("results.txt", "results.csv", "results.pandas", FINAL_METRICS)
WHOLE_TRACK = {
    "uSDR": "uSDR in dB, whole track (MDX challenges)",
    "SI_SDR": "SI-SDR in dB, whole track",
}


def describe_track(track: ScoredTrack) -> str:
    """Return a line: SDR, gain over the mixture, share of NaN frames, of each target."""
    shown = []
    for target in track.targets:
        _, model, gain, nan_share = track.sdr_cells(target)
        shown.append(f"{target} {model:.2f} dB (gain {gain:+.2f}, NaN {nan_share:.0%})")
    shown += [f"{target} none, {reason}" for target, reason in track.unscored.items()]
    return f"{track.name}: SDR {', '.join(shown)}"


def write_results(out: Path, scored: list[ScoredTrack], failures: dict[str, str]) -> str:
    """Write RESULTS, results.txt last. Return the text of results.txt.

    Args:
        failures: track -> why it has no scores.
    """
    store = import_museval().EvalStore()
    for track in scored:
        store.add_track(make_track_store(track.name, track.scores))
    text = _describe(store, scored, failures)
    with atomic_path(out / "results.csv") as temporary:
        _write_csv(temporary, scored)
    with atomic_path(out / "results.pandas") as temporary:
        store.save(temporary)
    with atomic_path(out / FINAL_METRICS) as temporary:
        temporary.write_text(json.dumps(final_metrics(scored), indent=2) + "\n", encoding="utf-8")
    with atomic_path(out / "results.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def final_metrics(scored: list[ScoredTrack]) -> dict[str, float | None]:
    """Return TARGET_METRIC_median and TARGET_METRIC_mean over tracks, in dB; None for no score.

    A track counts with the median over its frames, or with its whole-track score.
    """
    found = {}
    for target in list_targets(scored):
        rows = [track_metrics(track, target) for track in scored if target in track.scores]
        for metric in rows[0]:
            values = np.array([row[metric] for row in rows])
            for name, function in AGGREGATES.items():
                value = float(aggregate(function, values))
                found[f"{target}_{metric}_{name}"] = round(value, 5) if np.isfinite(value) else None
    return found


def track_metrics(track: ScoredTrack, target: str) -> dict[str, float]:
    """Return metric -> dB of a track, also of the untouched mixture as an estimate."""
    frames = track.scores[target]
    found = {metric: summarise(frames[metric])["median"] for metric in METRICS}
    found["mixture_SDR"] = track.record["mixture_SDR"][target]["median"]
    names = (f"{start}{metric}" for metric in WHOLE_TRACK for start in ("", "mixture_"))
    return {**found, **{name: track.record[name][target] for name in names}}


def list_targets(scored: list[ScoredTrack]) -> list[str]:
    """Return the targets that any of the tracks has, in the order in which they are shown."""
    return order_targets(target for track in scored for target in track.scores)


def _describe(store, scored: list[ScoredTrack], failures: dict[str, str]) -> str:
    lines = []
    if scored:
        lines += sdr_table(scored)
        for metric in WHOLE_TRACK:
            lines += ["", *whole_track_table(scored, metric)]
        for aggregates in (("median", "median"), ("median", "mean"), ("mean", "median")):
            store.frames_agg, store.tracks_agg = aggregates
            lines += ["", *(line.rstrip() for line in str(store).strip().splitlines())]
        lines += ["", describe_nan_frames(scored), *describe_unscored(scored)]
        lines += describe_clipping(scored)
    if failures:
        lines += ["", f"Not scored: {len(failures)} of {len(scored) + len(failures)} tracks"]
        lines += [f"  {name}: {reason}" for name, reason in sorted(failures.items())]
    return "\n".join(lines) + "\n"


def describe_nan_frames(scored: list[ScoredTrack]) -> str:
    """Return a line: how many frames have no score, since a source is silent in them."""
    shown = []
    for target in list_targets(scored):
        frames = [track.scores[target]["SDR"] for track in scored if target in track.scores]
        missing = np.isnan(np.concatenate(frames))
        shown.append(f"{target} {missing.sum()} of {missing.size} ({missing.mean():.1%})")
    return f"Frames without a score (NaN): {', '.join(shown)}"


def describe_unscored(scored: list[ScoredTrack]) -> list[str]:
    """Return lines: which targets of which tracks have no scores, and why."""
    lines = []
    for track in scored:
        if track.unscored:
            shown = ", ".join(f"{target} ({reason})" for target, reason in track.unscored.items())
            lines.append(f"  {track.name}: {shown}")
    return ["", "Targets without scores:", *lines] if lines else []


def describe_clipping(scored: list[ScoredTrack]) -> list[str]:
    """Return lines: how many samples of which files were clipped to full scale when they were read.

    Only files of floats, and .stem.mp4 files, can have any.
    """
    lines = []
    for track in scored:
        if clipped := track.record.get("clipped"):  # records of earlier versions have none
            files = ", ".join(f"{file} {count}" for file, count in clipped.items())
            lines.append(f"  {track.name}: {files}")
    if not lines:
        return []
    heading = (
        "Samples beyond full scale in the test set, clipped as musdb does (--float_references reads"
        " them as they are):"
    )
    return ["", heading, *lines]


def sdr_table(scored: list[ScoredTrack]) -> list[str]:
    """Return the lines of a table: SDR of mixture and model, per track and over tracks."""
    heading = f"{'mixture':>10}{'model':>8}{'gain':>8}{'NaN':>6}"
    form = "{:>10.2f}{:>8.2f}{:>+8.2f}{:>6.0%}"
    title = "SDR in dB, median over 1 s frames"
    return _tables(title, heading, form, scored, ScoredTrack.sdr_cells)


def whole_track_table(scored: list[ScoredTrack], metric: str) -> list[str]:
    """Return the same table of a metric of WHOLE_TRACK."""
    heading = f"{'mixture':>10}{'model':>8}{'gain':>8}"

    def cells(track: ScoredTrack, target: str) -> tuple:
        return track.whole_track_cells(metric, target)

    return _tables(WHOLE_TRACK[metric], heading, "{:>10.2f}{:>8.2f}{:>+8.2f}", scored, cells)


def _tables(title: str, heading: str, form: str, scored: list[ScoredTrack], cells) -> list[str]:
    """Return the lines of a table of vocals and accompaniment, and of one of the other targets.

    Args:
        cells: (track, target) -> numbers.
    """
    targets = list_targets(scored)
    pair = [target for target in targets if target in TARGETS]
    others = [target for target in targets if target not in TARGETS]
    lines = []
    for group in filter(None, (pair, others)):
        rows = {track.name: [cells(track, target) for target in group] for track in scored}
        lines += ["", *_table(title, heading, form, group, rows)]
    return lines[1:]


def _table(
    title: str, heading: str, form: str, targets: list[str], rows: dict[str, list[tuple]]
) -> list[str]:
    """Return a line per track, then median and mean over tracks; columns per target."""
    cells = np.array(list(rows.values()))  # (tracks, targets, cells)
    rows["median over tracks"] = aggregate(np.nanmedian, cells, axis=0)
    rows["mean over tracks"] = aggregate(np.nanmean, cells, axis=0)
    width = max(len(title), *map(len, rows))
    lines = [
        f"{title:{width}}" + "".join(f"{target:>{len(heading)}}" for target in targets),
        f"{'track':{width}}" + len(targets) * heading,
    ]
    for name, of_targets in rows.items():
        lines.append(f"{name:{width}}" + "".join(form.format(*numbers) for numbers in of_targets))
    return lines


def _write_csv(path: Path, scored: list[ScoredTrack]) -> None:
    columns = [f"{metric}_{name}" for name in AGGREGATES for metric in METRICS]
    columns += [f"mixture_SDR_{name}" for name in AGGREGATES]
    usdr, si_sdr = ((metric, f"mixture_{metric}") for metric in WHOLE_TRACK)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["track", "target", *columns, *usdr, "frames", "nan_share", *si_sdr])
        for track in scored:
            for target in track.targets:
                frames, record = track.scores[target], track.record
                summaries = {metric: summarise(frames[metric]) for metric in METRICS}
                values = [summaries[metric][name] for name in AGGREGATES for metric in METRICS]
                values += [record["mixture_SDR"][target][name] for name in AGGREGATES]
                values += [record[name][target] for name in usdr]
                after = [track.nan_share(target), *(record[name][target] for name in si_sdr)]
                shown = [[f"{value:.5f}" for value in part] for part in (values, after)]
                writer.writerow([track.name, target, *shown[0], len(frames["SDR"]), *shown[1]])
