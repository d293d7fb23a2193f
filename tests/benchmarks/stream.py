"""The causal model block by block."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.cases import RATE, Case, choose_method, count_gflop, matrix_rate, measure
from benchmarks.measuring import stopwatch
from benchmarks.options import (
    add_common,
    add_precision,
    choose_devices,
    choose_precisions,
    milliseconds,
    read_sizes,
    seconds,
)
from benchmarks.report import print_table
from local.streaming import StreamingConvTasNet

BLOCKS_MS = (1.0, 5.0, 10.0, 20.0, 200.0)
COMPARED_SECONDS = 4.0  # with the textbook
WARM_UP_BLOCKS = 10
COLUMNS = {
    "device": ("device", 6, ""),
    "precision": ("precision", 9, ""),
    "block_ms": ("block ms", 8, ".0f"),
    "median_ms": ("median ms", 10, ".3f"),
    "p99_ms": ("99th % ms", 10, ".3f"),
    "longest_ms": ("longest ms", 10, ".3f"),
    "rtf": ("RTF", 8, ".4f"),
    "matrix_share": ("matrix %", 8, ".1f"),
    "error": ("error", 8, ".1e"),
    "latency_ms": ("latency ms", 10, ".2f"),
    "state_mb": ("state MB", 8, ".2f"),
}


def add_options(commands) -> None:
    parser = commands.add_parser("stream", help="the causal model block by block")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--seconds", type=seconds, default=60.0, help="of audio [%(default)g]")
    add("--blocks", type=milliseconds, nargs="+", default=BLOCKS_MS, help="in ms [1 5 10 20 200]")
    add_precision(parser)
    add_common(parser, with_repeats=False)


def run(args: argparse.Namespace) -> dict:
    torch.backends.cudnn.allow_tf32 = False
    sizes = read_sizes(args)
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            Case(device, "causal", args.seconds, sizes, Path(folder))
            for device in choose_devices(args.device)
        ]
        print(f"\nThe causal model, {args.seconds:g} s in blocks; the error is the greatest of a")
        print("sample, relative to the greatest sample of the textbook's estimates.")
        streams = print_table(COLUMNS, stream_rows(cases, args))
    for text in describe_real_time(streams):
        print(text)
    return {"stream": streams}


def stream_rows(cases: list[Case], args: argparse.Namespace) -> Iterator[dict]:
    for case in cases:
        measure(save_reference, case)
        for precision in choose_precisions(args.precision, case.device):
            for block_ms in args.blocks:
                yield measure(measure_stream, case, block_ms, precision)


def describe_real_time(streams: list[dict]) -> Iterator[str]:
    for kind in dict.fromkeys((row["device"], row["precision"]) for row in streams):
        blocks = [
            f"{row['block_ms']:g} ms"
            for row in streams
            if (row["device"], row["precision"]) == kind and row["p99_ms"] <= row["block_ms"]
        ]
        shown = f"blocks of {', '.join(blocks)}" if blocks else "no block"
        yield f"{' '.join(kind)}: {shown} in real time (99 pushes of 100 are shorter than a block)"


@torch.no_grad()
def save_reference(case: Case) -> None:
    """The textbook's estimates of the first seconds."""
    model, mixture = case.load()
    start = mixture[:, : round(COMPARED_SECONDS * RATE)]
    torch.save(choose_method(case, model, "textbook")(start), case.reference)


def measure_stream(case: Case, block_ms: float, precision: str) -> dict:
    model, mixture = case.load()
    stream = StreamingConvTasNet(model, precision)
    blocks = mixture.split(round(block_ms * RATE / 1000), dim=-1)
    for block in blocks[:WARM_UP_BLOCKS]:
        stream.push(block)
    stream.reset()
    rate_before = matrix_rate(case)
    pushes = [stopwatch(case.device, lambda block=block: stream.push(block)) for block in blocks]
    rate = (rate_before + matrix_rate(case)) / 2
    estimates = torch.cat([*(final for final, _ in pushes), stream.flush()], dim=-1)
    times = torch.tensor([push_s for _, push_s in pushes], dtype=torch.float64)
    expected = torch.load(case.reference)
    same = slice(expected.shape[-1] - stream.latency)  # its last samples lack what comes later
    error = (estimates[..., same] - expected[..., same]).abs().max() / expected.abs().max()
    return {
        "device": case.device,
        "precision": precision,
        "block_ms": block_ms,
        "median_ms": 1000 * times.median().item(),
        "p99_ms": 1000 * times.quantile(0.99).item(),
        "longest_ms": 1000 * times.max().item(),
        "rtf": times.sum().item() / case.seconds,
        "matrix_gflop_per_s": rate,
        "matrix_share": 100 * count_gflop(model, mixture.shape[-1]) / times.sum().item() / rate,
        "error": float(error),
        "latency_ms": 1000 * stream.latency / RATE,
        "state_mb": stream.state_size / 1e6,
    }
