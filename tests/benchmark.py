"""What the model costs, by hand: python tests/benchmark.py separate [options]

Needs torch and huggingface_hub alone, so that it runs on a bare machine with a GPU.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import textbook

from local.inference import METHODS, separate
from local.rows import tile_size
from local.streaming import StreamingConvTasNet
from local.tasnet import ConvTasNetStereo

RATE = 44100
SIZES = dict(N=256, B=256, H=512, X=10, R=4)  # of the published models
CONF = dict(L=20, P=3, C=2, audio_channels=2, samplerate=RATE, mask_nonlinear="relu")
MODELS = {
    "causal": dict(causal=True, norm_type="cLN"),
    "non-causal": dict(causal=False, norm_type="gLN"),
}
SHORTEST, LONGEST = 0.01, 3600.0  # seconds; below, there might be no frame to measure
STREAM_SECONDS = 60.0  # beside the longest, to show that the memory of a stream does not grow
BLOCKS_MS = (1, 5, 20, 200)
MATRIX_BURSTS, BURST = 10, 8
WARM_UP_SAMPLES = RATE // 10
WARM_UP_BLOCKS = 10

SONG_COLUMNS = {  # key: heading, width, format
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
STREAM_COLUMNS = {
    "device": ("device", 6, ""),
    "block_ms": ("block ms", 8, ".0f"),
    "median_ms": ("median ms", 10, ".3f"),
    "p99_ms": ("99th % ms", 10, ".3f"),
    "rtf": ("RTF", 8, ".4f"),
    "matrix_share": ("matrix %", 8, ".1f"),
    "error": ("error", 8, ".1e"),
    "latency_ms": ("latency ms", 10, ".2f"),
    "state_mb": ("state MB", 8, ".2f"),
}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        args.run(args)
    except (BrokenProcessPool, torch.cuda.OutOfMemoryError) as error:
        sys.exit(f"benchmark.py: error: probably out of memory: {error}")


# Options


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"benchmark.py: error: {message}\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_separate(commands)
    args = parser.parse_args(arguments)
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json: cannot write {args.json}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here")
    return args


def add_separate(commands) -> None:
    parser = commands.add_parser("separate", help="every method of separation and the textbook")
    parser.set_defaults(run=benchmark_separate)
    add = parser.add_argument
    add("--lengths", type=seconds, nargs="+", default=[4.0, 20.0], help="of songs in s [4 20]")
    add(
        "--longest",
        type=seconds_or_none,
        default=240.0,
        help="of one more song in s, without the textbook; 0 for none [%(default)g]",
    )
    add("--repeats", type=count, default=3, help="the median is shown [%(default)s]")
    add("--device", choices=["cpu", "cuda", "all"], default="all", help="[%(default)s]")
    add("--json", type=Path, metavar="FILE", help="where to write all of it")
    for name, size in SIZES.items():
        add(f"--{name}", type=count, default=size, help="of the model [%(default)s]")


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not SHORTEST <= value <= LONGEST:
        raise argparse.ArgumentTypeError(
            f"expected seconds from {SHORTEST:g} to {LONGEST:g}, got {text!r}"
        )
    return value


def seconds_or_none(text: str) -> float:
    return 0.0 if text == "0" else seconds(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


# What is measured


@dataclass(frozen=True)
class Case:
    """A model and its input, the same in every process that measures them."""

    device: str
    model: str
    seconds: float
    sizes: dict
    folder: Path

    @property
    def conf(self) -> dict:
        return {**CONF, **self.sizes, **MODELS[self.model]}

    @property
    def reference(self) -> Path:
        """Where the textbook's estimates are kept."""
        return self.folder / f"{self.device}-{self.model}-{self.seconds}.pt"

    def load(self) -> tuple[ConvTasNetStereo, Tensor]:
        """The model and a mixture (audio_channels, T), on the device."""
        torch.manual_seed(0)
        model = ConvTasNetStereo(**self.conf).eval()
        mixture = 0.1 * torch.randn(model.audio_channels, round(self.seconds * RATE))
        return model.to(self.device), mixture.to(self.device)


def benchmark_separate(args: argparse.Namespace) -> None:
    # All methods, and the matrix products they are held against, in one arithmetic: a GPU would
    # otherwise take the convolutions, but not the products, in TF32.
    torch.backends.cudnn.allow_tf32 = False
    machine = describe_machine(args.device)
    print(" | ".join(f"{key} {value}" for key, value in machine.items() if value), flush=True)
    sizes = {name: getattr(args, name) for name in SIZES}
    devices = ["cpu", "cuda"] if args.device == "all" else [args.device]
    devices = [name for name in devices if name == "cpu" or torch.cuda.is_available()]
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
        songs = print_table(SONG_COLUMNS, song_rows(cases, lengths, args))
        print(f"\nThe causal model as a stream, {lengths[0]:g} s in blocks.")
        streamed = [case for case in cases if case.seconds == lengths[0] and case.model == "causal"]
        streams = print_table(STREAM_COLUMNS, stream_rows(streamed, args.repeats))
    if args.json:
        write_json(args.json, {"machine": machine, "separate": songs, "stream": streams})


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


def stream_rows(cases: list[Case], repeats: int) -> Iterator[dict]:
    for case in cases:
        for block_ms in BLOCKS_MS:
            rows = [measure(measure_stream, case, float(block_ms)) for _ in range(repeats)]
            yield median_row(rows)


def median_row(rows: list[dict]) -> dict:
    return {
        key: statistics.median(row[key] for row in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    }


# Measurements


def measure(function: Callable[..., dict], case: Case, *args) -> dict:
    """On a CPU in a process of its own: a process's peak memory never falls."""
    if case.device != "cpu":
        return function(case, *args)
    # The server forks itself anew for every process, small and with torch already imported. Any
    # other child would inherit the peak of this process or take seconds to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "huggingface_hub.hub_mixin"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, case, *args).result()


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


def choose_method(case: Case, model: ConvTasNetStereo, method: str) -> Callable[[Tensor], Tensor]:
    """A function from (audio_channels, T) to (C, audio_channels, T)."""
    if method != "textbook":
        return lambda mixture: separate(model, mixture, method)
    state, conf = model.state_dict(), case.conf
    return lambda mixture: textbook.separate(state, conf, mixture[None])[0]


def relative_error(case: Case, estimates: Tensor) -> float | None:
    if not case.reference.exists():
        return None
    expected = torch.load(case.reference)
    return float((estimates - expected).norm() / expected.norm())


def measure_stream(case: Case, block_ms: float) -> dict:
    """The error is the greatest of a sample, relative to the greatest sample."""
    model, mixture = case.load()
    stream = StreamingConvTasNet(model)
    blocks = mixture.split(round(block_ms * RATE / 1000), dim=-1)
    for block in blocks[:WARM_UP_BLOCKS]:
        stream.push(block)
    stream.reset()
    rate_before = matrix_rate(case)
    pushes = [stopwatch(case.device, lambda block=block: stream.push(block)) for block in blocks]
    rate = (rate_before + matrix_rate(case)) / 2
    estimates = torch.cat([*(final for final, _ in pushes), stream.flush()], dim=-1)
    times = torch.tensor([push_s for _, push_s in pushes], dtype=torch.float64)
    work_s, expected = times.sum().item(), torch.load(case.reference)
    return {
        "device": case.device,
        "block_ms": block_ms,
        "median_ms": 1000 * times.median().item(),
        "p99_ms": 1000 * times.quantile(0.99).item(),
        "rtf": work_s / case.seconds,
        "matrix_gflop_per_s": rate,
        "matrix_share": 100 * count_gflop(model, mixture.shape[-1]) / work_s / rate,
        "error": float((estimates - expected).abs().max() / expected.abs().max()),
        "latency_ms": 1000 * stream.latency / RATE,
        "state_mb": stream.state_size / 1e6,
    }


def count_gflop(model: ConvTasNetStereo, samples: int) -> float:
    """What the convolutions and linear layers multiply and add, at 2 a pair."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv1d)]
    per_frame = sum(layer.weight.numel() for layer in layers)
    per_frame += model.C * model.decoder.basis_signals.weight.numel()
    frames = (samples - model.encoder.length) // model.encoder.hop + 1
    return 2e-9 * per_frame * frames


def matrix_rate(case: Case) -> float:
    """GFLOP/s of the two products that are nearly all of the model's work, by themselves."""
    B, H, tile = case.sizes["B"], case.sizes["H"], tile_size(torch.device(case.device))
    narrow, wide = (torch.randn(tile, size, device=case.device) for size in (B, H))
    up, down = (torch.randn(shape, device=case.device) for shape in ((H, B), (B, H)))

    def multiply() -> None:
        for _ in range(BURST):  # so that starting and waiting for a GPU does not show
            F.linear(narrow, up)
            F.linear(wide, down)

    times = [stopwatch(case.device, multiply)[1] for _ in range(MATRIX_BURSTS)]
    return 4e-9 * tile * B * H * BURST / statistics.median(times)


def stopwatch(device: str, work: Callable) -> tuple:
    """What the work returns, and the seconds that it took."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return result, time.perf_counter() - start


def start_memory(device: str) -> int:
    """Bytes in use; from here on a GPU looks out for the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# What is reported


def describe_machine(device: str) -> dict:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ", 1)[1] for line in cpuinfo if line.startswith("model name")]
    with_gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "cpu": (names or [platform.machine()])[0],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if with_gpu else None,
        "torch": torch.__version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def print_table(columns: dict, rows: Iterator[dict]) -> list[dict]:
    """Prints every row as soon as it is there, and returns them all."""
    print(*(heading.rjust(width) for heading, width, _ in columns.values()), flush=True)
    printed = []
    for row in rows:
        cells = (
            "".rjust(width) if row[key] is None else format(row[key], style).rjust(width)
            for key, (_, width, style) in columns.items()
        )
        print(*cells, flush=True)
        printed.append(row)
    return printed


def write_json(path: Path, content: dict) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
