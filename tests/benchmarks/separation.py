"""Every method of separation on whole songs, and the textbook."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import (
    MODELS,
    RATE,
    Case,
    choose_method,
    count_gflop,
    matrix_rate,
    measure,
)
from benchmarks.measuring import median_row, peak_memory, start_memory, stopwatch
from benchmarks.options import add_common, choose_devices, read_sizes, seconds, seconds_or_none
from benchmarks.report import print_table
from local.tools.choices import METHODS

STREAM_SECONDS = 60.0  # beside the longest, to show that the memory of a stream does not grow
WARM_UP_SAMPLES = RATE // 10
COLUMNS = {  # key: heading, width, format
    "device": ("device", 6, ""),
    "model": ("model", 10, ""),
    "method": ("method", 11, ""),
    "audio_s": ("audio s", 8, ".1f"),
    "work_s": ("work s", 9, ".3f"),
    "rtf": ("RTF", 8, ".4f"),
    "gflop_per_s": ("GFLOP/s", 8, ".1f"),
    "matrix_share": ("matrix %", 8, ".1f"),
    "extra_mb": ("extra MB", 9, ".1f"),
    "speed": ("speed x", 8, ".2f"),
    "error": ("error", 8, ".1e"),
}


def add_options(commands) -> None:
    parser = commands.add_parser("separate", help="every method of separation and the textbook")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--lengths", type=seconds, nargs="+", default=[4.0, 20.0], help="of songs in s [4 20]")
    add(
        "--longest",
        type=seconds_or_none,
        default=240.0,
        help="of one more song in s, without the textbook; 0 for none [%(default)g]",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> dict:
    # All methods, and the matrix products they are held against, in one arithmetic: a GPU would
    # otherwise take the convolutions, but not the products, in TF32.
    torch.backends.cudnn.allow_tf32 = False
    sizes = read_sizes(args)
    devices = choose_devices(args.device)
    lengths = list(dict.fromkeys(args.lengths))
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            Case(device, model, length, sizes, Path(folder))
            for device in devices
            for length in [*lengths, *longer_lengths(lengths, args.longest)]
            for model in MODELS
        ]
        print(
            "\nWhole songs; speed and error are those relative to the textbook's. By its crossfades"
        )
        print("overlap-add differs from it where a song is longer than one window.")
        songs = print_table(COLUMNS, song_rows(cases, lengths, args))
    return {"separate": songs}


def longer_lengths(lengths: list[float], longest: float) -> list[float]:
    longer = [STREAM_SECONDS, longest] if longest > STREAM_SECONDS else [longest]
    return [length for length in longer if length and length not in lengths]


def song_rows(cases: list[Case], lengths: list[float], args: argparse.Namespace) -> Iterator[dict]:
    for case in cases:
        causal = case.model == "causal"
        if case.seconds in lengths:
            methods = [method for method in METHODS if causal or method != "stream"]
            yield from compare_methods(case, ["textbook", *methods], args.repeats)
        elif causal:
            yield from compare_methods(case, ["stream"], repeats=1)
        elif case.seconds == args.longest:
            yield from compare_methods(case, ["full"], repeats=1)


def compare_methods(case: Case, methods: list[str], repeats: int) -> Iterator[dict]:
    """A row per method: the medians over rounds in which the methods take turns."""
    rounds = []
    for _ in range(repeats):
        rows = {method: measure(measure_song, case, method) for method in methods}
        for row in rows.values():
            row["speed"] = (
                rows["textbook"]["work_s"] / row["work_s"] if "textbook" in rows else None
            )
        rounds.append(rows)
    for method in methods:
        yield median_row([rows[method] for rows in rounds])


@torch.no_grad()
def measure_song(case: Case, method: str) -> dict:
    model, mixture = case.load()
    run = choose_method(case, model, method)
    # A GPU chooses its kernels, and asks for its memory, when it first sees a shape.
    run(mixture if case.device == "cuda" else mixture[:, :WARM_UP_SAMPLES])
    rate_before = matrix_rate(case)
    memory_before = start_memory(case.device)
    estimates, work_s = stopwatch(case.device, lambda: run(mixture))
    extra = peak_memory(case.device) - memory_before - estimates.nbytes
    rate = (rate_before + matrix_rate(case)) / 2
    if method == "textbook":
        torch.save(estimates, case.reference)
    gflop_per_s = count_gflop(model, mixture.shape[-1]) / work_s
    return {
        "device": case.device,
        "model": case.model,
        "method": method,
        "audio_s": case.seconds,
        "work_s": work_s,
        "rtf": work_s / case.seconds,
        "gflop_per_s": gflop_per_s,
        "matrix_gflop_per_s": rate,
        "matrix_share": 100 * gflop_per_s / rate,
        "extra_mb": max(0, extra) / 1e6,
        "error": relative_error(case, estimates) if method != "textbook" else None,
    }


def relative_error(case: Case, estimates: Tensor) -> float | None:
    if not case.reference.exists():
        return None
    expected = torch.load(case.reference)
    return float((estimates - expected).norm() / expected.norm())
