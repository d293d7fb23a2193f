"""The results over all tracks: results.txt, results.csv, results.pandas."""

import csv
from pathlib import Path

import numpy as np

from local.eval.score_files import (
    AGGREGATES,
    METRICS,
    ScoredTrack,
    aggregate,
    make_track_store,
    summarise,
)
from local.musdb18_tracks import TARGETS
from local.tools.files import atomic_path
from local.tools.museval_guard import import_museval

RESULTS = ("results.txt", "results.csv", "results.pandas")


def describe_track(track: ScoredTrack) -> str:
    """Return a line: SDR, gain over the mixture, share of NaN frames, of each target."""
    shown = []
    for target in TARGETS:
        _, model, gain, nan_share = track.sdr_cells(target)
        shown.append(f"{target} {model:.2f} dB (gain {gain:+.2f}, NaN {nan_share:.0%})")
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
    with atomic_path(out / "results.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _describe(store, scored: list[ScoredTrack], failures: dict[str, str]) -> str:
    lines = []
    if scored:
        lines += [*sdr_table(scored), "", *usdr_table(scored)]
        for aggregates in (("median", "median"), ("median", "mean"), ("mean", "median")):
            store.frames_agg, store.tracks_agg = aggregates
            lines += ["", *(line.rstrip() for line in str(store).strip().splitlines())]
        lines += ["", describe_nan_frames(scored), *describe_clipping(scored)]
    if failures:
        lines += ["", f"Not scored: {len(failures)} of {len(scored) + len(failures)} tracks"]
        lines += [f"  {name}: {reason}" for name, reason in sorted(failures.items())]
    return "\n".join(lines) + "\n"


def describe_nan_frames(scored: list[ScoredTrack]) -> str:
    """Return a line: how many frames have no score, since a source is silent in them."""
    shown = []
    for target in TARGETS:
        missing = np.concatenate([np.isnan(track.scores[target]["SDR"]) for track in scored])
        shown.append(f"{target} {missing.sum()} of {missing.size} ({missing.mean():.1%})")
    return f"Frames without a score (NaN): {', '.join(shown)}"


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
    rows = {track.name: [track.sdr_cells(target) for target in TARGETS] for track in scored}
    heading = f"{'mixture':>10}{'model':>8}{'gain':>8}{'NaN':>6}"
    return _table(
        "SDR in dB, median over 1 s frames", heading, "{:>10.2f}{:>8.2f}{:>+8.2f}{:>6.0%}", rows
    )


def usdr_table(scored: list[ScoredTrack]) -> list[str]:
    """Return the same table of uSDR, the whole-track SDR of the Music Demixing challenges."""
    rows = {track.name: [track.usdr_cells(target) for target in TARGETS] for track in scored}
    heading = f"{'mixture':>10}{'model':>8}{'gain':>8}"
    return _table(
        "uSDR in dB, whole track (MDX challenges)", heading, "{:>10.2f}{:>8.2f}{:>+8.2f}", rows
    )


def _table(title: str, heading: str, form: str, rows: dict[str, list[tuple]]) -> list[str]:
    """Return a line per track, then median and mean over tracks; columns per target."""
    cells = np.array(list(rows.values()))  # (tracks, targets, cells)
    rows["median over tracks"] = aggregate(np.nanmedian, cells, axis=0)
    rows["mean over tracks"] = aggregate(np.nanmean, cells, axis=0)
    width = max(len(title), *map(len, rows))
    lines = [
        f"{title:{width}}" + "".join(f"{target:>{len(heading)}}" for target in TARGETS),
        f"{'track':{width}}" + len(TARGETS) * heading,
    ]
    for name, targets in rows.items():
        lines.append(f"{name:{width}}" + "".join(form.format(*numbers) for numbers in targets))
    return lines


def _write_csv(path: Path, scored: list[ScoredTrack]) -> None:
    columns = [f"{metric}_{name}" for name in AGGREGATES for metric in METRICS]
    columns += [f"mixture_SDR_{name}" for name in AGGREGATES] + ["uSDR", "mixture_uSDR"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["track", "target", *columns, "frames", "nan_share"])
        for track in scored:
            for target in TARGETS:
                frames = track.scores[target]
                summaries = {metric: summarise(frames[metric]) for metric in METRICS}
                values = [summaries[metric][name] for name in AGGREGATES for metric in METRICS]
                values += [track.record["mixture_SDR"][target][name] for name in AGGREGATES]
                values += [track.record[name][target] for name in ("uSDR", "mixture_uSDR")]
                values.append(track.nan_share(target))
                shown = [f"{value:.5f}" for value in values]
                writer.writerow([track.name, target, *shown[:-1], len(frames["SDR"]), shown[-1]])
