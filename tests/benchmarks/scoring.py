"""BSSEval, and stock museval."""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases import RATE
from benchmarks.loading import write_noise
from benchmarks.measuring import measure_apart, median_row, peak_memory, start_memory, stopwatch
from benchmarks.options import count, seconds
from benchmarks.report import print_table

SCORE_COLUMNS = {
    "scorer": ("scorer", 8, ""),
    "audio_s": ("audio s", 8, ".0f"),
    "work_s": ("work s", 8, ".2f"),
    "speed": ("speed x", 8, ".1f"),
    "extra_mb": ("extra MB", 9, ".0f"),
    "memory_share": ("memory x", 8, ".3f"),
    "deviation_db": ("deviation dB", 12, ".1e"),
}
POOL_COLUMNS = {
    "jobs": ("jobs", 8, "d"),
    "tracks": ("tracks", 8, "d"),
    "work_s": ("work s", 8, ".2f"),
    "tracks_per_minute": ("tracks/min", 10, ".1f"),
}


def add_options(commands) -> None:
    parser = commands.add_parser("score", help="BSSEval, and stock museval")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--lengths", type=seconds, nargs="+", default=[30.0, 60.0, 240.0], help="[30 60 240]")
    add("--repeats", type=count, default=3, help="the median is shown [%(default)s]")
    add("--jobs", type=count, default=os.cpu_count(), help="of the pool [%(default)s]")
    add(
        "--tracks", type=count, default=8, help="of the greatest length, for the pool [%(default)s]"
    )


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        print("\nA track of two stereo sources on one core; speed, memory and deviation are those")
        print("relative to museval's.")
        scores = print_table(SCORE_COLUMNS, score_rows(Path(folder), args))
        print(f"\n{args.tracks} tracks of {max(args.lengths):g} s from wav to JSON.")
        pool = print_table(POOL_COLUMNS, pool_rows(Path(folder), args))
    return {"score": scores, "pool": pool}


def score_rows(folder: Path, args: argparse.Namespace) -> Iterator[dict]:
    for length in args.lengths:
        write_signals(folder, round(length * RATE))
        rounds = []
        for _ in range(args.repeats):
            rows = [measure_apart(measure_scorer, folder, name) for name in ("museval", "bsseval")]
            for row in rows:
                row["audio_s"] = length
                row["speed"] = rows[0]["work_s"] / row["work_s"]
                row["memory_share"] = row["extra_mb"] / rows[0]["extra_mb"]
            rounds.append(rows)
        for rows in zip(*rounds, strict=True):
            yield median_row(rows)


def write_signals(folder: Path, time: int) -> None:
    """References and estimates with filtering, interference and artifacts, float64."""
    import numpy as np

    random = np.random.default_rng(0)
    references = random.standard_normal((2, time, 2))
    estimates = 0.8 * references + 0.3 * np.roll(references, 3, axis=1) + 0.2 * references[::-1]
    np.save(folder / "estimates.npy", estimates + 0.1 * random.standard_normal(references.shape))
    np.save(folder / "references.npy", references)


def measure_scorer(folder: Path, scorer: str) -> dict:
    import museval
    import numpy as np
    from threadpoolctl import threadpool_limits

    from local.eval.bsseval import bss_eval

    threadpool_limits(1)
    references, estimates = (np.load(folder / f"{x}.npy") for x in ("references", "estimates"))
    score = museval.evaluate if scorer == "museval" else bss_eval
    memory_before = max(start_memory("cpu"), peak_memory("cpu"))
    score(references[:, :RATE], estimates[:, :RATE])
    ratios, work_s = stopwatch("cpu", lambda: np.stack(score(references, estimates)))
    extra = peak_memory("cpu") - memory_before
    expected = folder / "museval.npy"
    if scorer == "museval":
        np.save(expected, ratios)
    deviation = float(np.abs(ratios - np.load(expected)).max())
    return {
        "scorer": scorer,
        "work_s": work_s,
        "extra_mb": extra / 1e6,
        "deviation_db": None if scorer == "museval" else deviation,
    }


def pool_rows(folder: Path, args: argparse.Namespace) -> Iterator[dict]:
    import numpy as np

    from local.eval.pool import ScoringPool
    from local.eval.tracks import open_test_set, read_track
    from local.musdb18_tracks import TARGETS

    write_noise(folder, "test", args.tracks, max(args.lengths))
    (folder / "out" / "test").mkdir(parents=True)
    tracks = open_test_set(folder, RATE, "wav")
    audio, _ = read_track(tracks[0])
    # As with a model's, nothing is silent; that they belong to one track alone costs nothing.
    estimates = {target: np.float32(0.7) * audio[target] for target in TARGETS}
    for jobs in dict.fromkeys((1, args.jobs)):
        start = time.perf_counter()
        silent = contextlib.redirect_stdout(io.StringIO())
        with silent, ScoringPool(folder / "out", jobs, "bsseval") as pool:
            for track in tracks:
                pool.submit(track, estimates, {})
            scored, failures = pool.finish()
        work_s = time.perf_counter() - start
        if failures:
            raise RuntimeError(f"not scored: {failures}")
        yield {
            "jobs": jobs,
            "tracks": len(scored),
            "work_s": work_s,
            "tracks_per_minute": 60 * len(scored) / work_s,
        }
