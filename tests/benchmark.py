"""What the model costs, by hand: python tests/benchmark.py COMMAND [options]; see --help

Needs torch and huggingface_hub alone, so that it runs on a bare machine with a GPU; load needs
soundfile, too, and score all of requirements.txt.
"""

import argparse
import contextlib
import datetime
import io
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
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

import textbook

from local.fast.choose import find_compiler_fault, find_kernel_fault
from local.fast.packed import find_precision_fault
from local.fast.rows import tile_size
from local.fast.training import TrainingForward, allow_tf32_products
from local.inference import separate
from local.streaming import StreamingConvTasNet
from local.tasnet import ConvTasNetStereo
from local.tools.choices import MEMORY, METHODS, PRECISIONS

RATE = 44100
SIZES = dict(N=256, B=256, H=512, X=10, R=4)  # of the published models
CONF = dict(L=20, P=3, C=2, audio_channels=2, samplerate=RATE, mask_nonlinear="relu")
MODELS = {
    "causal": dict(causal=True, norm_type="cLN"),
    "non-causal": dict(causal=False, norm_type="gLN"),
}
SHORTEST, LONGEST = 0.01, 3600.0  # seconds; below, there might be no frame to measure
STREAM_SECONDS = 60.0  # beside the longest, to show that the memory of a stream does not grow
BLOCKS_MS = (1.0, 5.0, 10.0, 20.0, 200.0)
COMPARED_SECONDS = 4.0  # of a stream, with the textbook
MATRIX_BURSTS, BURST = 10, 8
WARM_UP_SAMPLES = RATE // 10
WARM_UP_BLOCKS = 10
TRAINING_SHAPES = {"cpu": (1, 1.0), "cuda": (4, 5.0)}  # batch size, seconds of an item
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
STEPS = 3  # after the first
LOAD_SOURCES = ("vocals", "bass", "drums", "other")
LOAD_TRACKS, LOAD_TRACK_SECONDS, LOAD_BATCH, LOAD_ROUNDS = 6, 20.0, 4, 5

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
LOAD_COLUMNS = {
    "loader": ("loader", 14, ""),
    "workers": ("workers", 7, "d"),
    "page_cache": ("page cache", 10, ""),
    "items_per_s": ("items/s", 8, ".1f"),
    "per_core": ("per core", 8, ".1f"),
    "speed": ("speed x", 8, ".2f"),
}
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
STEP_COLUMNS = {
    "device": ("device", 6, ""),
    "model": ("model", 10, ""),
    "step": ("step", 8, ""),
    "memory": ("memory", 6, ""),
    "precision": ("precision", 9, ""),
    "step_s": ("step s", 8, ".3f"),
    "speed": ("speed x", 8, ".2f"),
    "floor_s": ("floor s", 8, ".3f"),
    "floor_share": ("floor %", 8, ".1f"),
    "extra_mb": ("extra MB", 9, ".0f"),
    "memory_share": ("memory x", 8, ".3f"),
    "song_mb": ("song MB", 9, ".0f"),
    "compile_s": ("compile s", 9, ".0f"),
    "error": ("error", 8, ".1e"),
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
    add_stream(commands)
    add_train(commands)
    add_load(commands)
    add_score(commands)
    args = parser.parse_args(arguments)
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json: cannot write {args.json}")
    if getattr(args, "device", None) == "cuda" and not torch.cuda.is_available():
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
    add_common(parser)


def add_stream(commands) -> None:
    parser = commands.add_parser("stream", help="the causal model block by block")
    parser.set_defaults(run=benchmark_stream)
    add = parser.add_argument
    add("--seconds", type=seconds, default=60.0, help="of audio [%(default)g]")
    add("--blocks", type=milliseconds, nargs="+", default=BLOCKS_MS, help="in ms [1 5 10 20 200]")
    add(
        "--precision",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="[both, where the device has bf16]",
    )
    add_common(parser, with_repeats=False)


def add_train(commands) -> None:
    parser = commands.add_parser("train", help="a training step in every setting, and the textbook")
    parser.set_defaults(run=benchmark_train)
    add = parser.add_argument
    add("--seconds", type=seconds, help="of an item [1 on a CPU, 5 on a GPU]")
    add("--batch", type=count, help="items [1 on a CPU, 4 on a GPU]")
    add("--models", choices=MODELS, nargs="+", default=list(MODELS), help="[both]")
    add("--memory", choices=MEMORY, nargs="+", default=list(MEMORY), help="[all]")
    add("--compile", choices=["no", "yes", "both"], default="both", help="[%(default)s]")
    add("--song", type=seconds, default=420.0, help="validated after steps on a GPU [%(default)g]")
    add_common(parser)


def add_load(commands) -> None:
    parser = commands.add_parser("load", help="training items, and the textbook's")
    parser.set_defaults(run=benchmark_load)
    parser.add_argument("--seconds", type=seconds, default=5.0, help="of an item [%(default)g]")
    parser.add_argument("--items", type=count, default=200, help="per worker [%(default)s]")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="[%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all of it")


def add_score(commands) -> None:
    parser = commands.add_parser("score", help="BSSEval, and stock museval")
    parser.set_defaults(run=benchmark_score)
    add = parser.add_argument
    add("--lengths", type=seconds, nargs="+", default=[30.0, 60.0, 240.0], help="[30 60 240]")
    add("--repeats", type=count, default=3, help="the median is shown [%(default)s]")
    add("--jobs", type=count, default=os.cpu_count(), help="of the pool [%(default)s]")
    add(
        "--tracks", type=count, default=8, help="of the greatest length, for the pool [%(default)s]"
    )
    add("--json", type=Path, metavar="FILE", help="where to write all of it")


def add_common(parser: argparse.ArgumentParser, with_repeats: bool = True) -> None:
    add = parser.add_argument
    if with_repeats:
        add("--repeats", type=count, default=3, help="the median is shown [%(default)s]")
    add("--device", choices=["cpu", "cuda", "all"], default="all", help="[%(default)s]")
    add("--json", type=Path, metavar="FILE", help="where to write all of it")
    for name, size in SIZES.items():
        add(f"--{name}", type=count, default=size, help="of the model [%(default)s]")


def seconds(text: str) -> float:
    return number(text, "seconds", SHORTEST, LONGEST)


def seconds_or_none(text: str) -> float:
    return 0.0 if text == "0" else seconds(text)


def milliseconds(text: str) -> float:
    return number(text, "milliseconds", 0.1, 10_000)


def number(text: str, unit: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(
            f"expected {unit} from {least:g} to {most:g}, got {text!r}"
        )
    return value


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
    machine = show_machine(args.device)
    sizes = {name: getattr(args, name) for name in SIZES}
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
        songs = print_table(SONG_COLUMNS, song_rows(cases, lengths, args))
    if args.json:
        write_json(args.json, {"machine": machine, "separate": songs})


def choose_devices(wanted: str) -> list[str]:
    devices = ["cpu", "cuda"] if wanted == "all" else [wanted]
    return [name for name in devices if name == "cpu" or torch.cuda.is_available()]


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


def benchmark_stream(args: argparse.Namespace) -> None:
    torch.backends.cudnn.allow_tf32 = False
    machine = show_machine(args.device)
    sizes = {name: getattr(args, name) for name in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            Case(device, "causal", args.seconds, sizes, Path(folder))
            for device in choose_devices(args.device)
        ]
        print(f"\nThe causal model, {args.seconds:g} s in blocks; the error is the greatest of a")
        print("sample, relative to the greatest sample of the textbook's estimates.")
        streams = print_table(STREAM_COLUMNS, stream_rows(cases, args))
    for text in describe_real_time(streams):
        print(text)
    if args.json:
        write_json(args.json, {"machine": machine, "stream": streams})


def stream_rows(cases: list[Case], args: argparse.Namespace) -> Iterator[dict]:
    for case in cases:
        measure(save_reference, case)
        for precision in args.precision:
            if find_precision_fault(precision, torch.device(case.device)):
                continue
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
    return measure_apart(function, case, *args)


def measure_apart(function: Callable[..., dict], *args) -> dict:
    # The server forks itself anew for every process, small and with torch already imported. Any
    # other child would inherit the peak of this process or take seconds to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "huggingface_hub.hub_mixin"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


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


def count_gflop(model: ConvTasNetStereo, samples: int) -> float:
    """What the convolutions and linear layers multiply and add, at 2 a pair."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv1d)]
    per_frame = sum(layer.weight.numel() for layer in layers)
    per_frame += model.C * model.decoder.basis_signals.weight.numel()
    frames = (samples - model.encoder.length) // model.encoder.hop + 1
    return 2e-9 * per_frame * frames


def matrix_rate(case: Case, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of the two products that are nearly all of the model's work, by themselves."""
    B, H, tile = case.sizes["B"], case.sizes["H"], tile_size(torch.device(case.device))
    shapes = (tile, B), (tile, H), (H, B), (B, H)
    narrow, wide, up, down = (torch.randn(s, device=case.device, dtype=dtype) for s in shapes)

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
    """Bytes in use; from here on the peak counts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # or that of comparing the formulas would count
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Training steps


@dataclass(frozen=True)
class Step:
    """How a training step is taken."""

    name: str  # textbook, plain or compiled
    memory: str | None = None
    precision: str = "float32"


@dataclass(frozen=True)
class Training(Case):
    """A model and a batch; `seconds` is the length of an item."""

    batch: int
    song: float

    def load_batch(self) -> tuple[ConvTasNetStereo, Tensor, Tensor]:
        """The model, a mixture (M, audio_channels, T) and targets (M, C, audio_channels, T)."""
        model, _ = self.load()
        time = round(self.seconds * RATE)
        targets = 0.1 * torch.randn(self.batch, model.C, model.audio_channels, time)
        targets = targets.to(self.device)
        return model.train(), targets.sum(1), targets


def benchmark_train(args: argparse.Namespace) -> None:
    machine = show_machine(args.device)
    sizes = {name: getattr(args, name) for name in SIZES}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # so that compiling is really measured
        print("\nTraining steps; speed and memory are those relative to the textbook's, which is")
        print("float32. The floor is the products alone, at the rate measured beside the step.")
        for device in choose_devices(args.device):
            batch, seconds = TRAINING_SHAPES[device]
            cases = [
                Training(
                    device,
                    model,
                    args.seconds or seconds,
                    sizes,
                    Path(folder),
                    args.batch or batch,
                    args.song,
                )
                for model in args.models
            ]
            print(f"{cases[0].batch} x {cases[0].seconds:g} s on {device}")
            rows += print_table(STEP_COLUMNS, step_rows(cases, choose_steps(device, args), args))
    if args.json:
        write_json(args.json, {"machine": machine, "train": rows})


def choose_steps(device: str, args: argparse.Namespace) -> list[Step]:
    names = {"no": ["plain"], "yes": ["compiled"], "both": ["plain", "compiled"]}[args.compile]
    if "compiled" in names and (fault := find_compiler_fault(torch.device(device))):
        names.remove("compiled")
        print(f"without torch.compile: {fault}")
    precisions = ["float32"] if device == "cpu" else list(DTYPES)
    steps = [Step(name, memory, p) for p in precisions for name in names for memory in args.memory]
    return [Step("textbook"), *steps]


def step_rows(cases: list[Training], steps: list[Step], args: argparse.Namespace) -> Iterator[dict]:
    """A row per step: the medians over rounds in which the steps take turns."""
    for case in cases:
        rounds = []
        for _ in range(args.repeats):
            rows = [measure_apart(measure_step, case, step) for step in steps]
            for row in rows:
                row["speed"] = rows[0]["step_s"] / row["step_s"]
                row["memory_share"] = row["extra_mb"] / rows[0]["extra_mb"]
            rounds.append(rows)
        for first, *others in zip(*rounds, strict=True):
            # Compiled once, and then found in the compiler's cache.
            yield median_row([first, *others]) | {"compile_s": first["compile_s"]}


def measure_step(case: Training, step: Step) -> dict:
    allow_tf32_products()
    model, mixture, targets = case.load_batch()
    take = choose_step(case, model, step)
    rate_before = matrix_rate(case, DTYPES[step.precision])
    memory_before = start_memory(case.device)
    loss, first_s = stopwatch(case.device, lambda: take(mixture, targets))
    error = gradient_error(case, model, step)
    times = [stopwatch(case.device, lambda: take(mixture, targets))[1] for _ in range(STEPS)]
    step_s = statistics.median(times)
    extra = peak_reserved(case.device) - memory_before
    rate = (rate_before + matrix_rate(case, DTYPES[step.precision])) / 2
    # Forward, and backward to the inputs and to the weights.
    floor_s = 3 * case.batch * count_gflop(model, mixture.shape[-1]) / rate
    return {
        "device": case.device,
        "model": case.model,
        "step": step.name,
        "memory": step.memory,
        "precision": step.precision,
        "loss": loss.item(),
        "step_s": step_s,
        "floor_s": floor_s,
        "floor_share": 100 * floor_s / step_s,
        "extra_mb": extra / 1e6,
        "song_mb": measure_validation(case, model, step) if case.device == "cuda" else None,
        "compile_s": first_s - step_s if step.name == "compiled" else None,
        "error": error,
    }


def choose_step(case: Training, model: ConvTasNetStereo, step: Step) -> Callable:
    """A function from mixture and targets to the loss, which trains the model."""
    is_textbook, state = step.name == "textbook", dict(model.named_parameters())
    compiled = step.name == "compiled"
    kernels = compiled and not find_kernel_fault(model, torch.device(case.device))  # as in train.py
    separate_batch = (
        partial(textbook.separate, state, case.conf)
        if is_textbook
        else TrainingForward(model, step.memory, compiled, kernels)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-9, fused=not is_textbook)

    def take(mixture: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        with autocast(case, step):
            loss = F.l1_loss(separate_batch(mixture), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return loss.detach()

    return take


def autocast(case: Training, step: Step) -> torch.autocast:
    dtype = DTYPES[step.precision]
    return torch.autocast(case.device, dtype, enabled=dtype != torch.float32)


def gradient_error(case: Training, model: ConvTasNetStereo, step: Step) -> float | None:
    """Of all gradients as one vector, after the first step, relative to the textbook's."""
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).cpu()
    if step.name == "textbook":
        torch.save(gradients, case.reference)
        return None
    expected = torch.load(case.reference)
    return float((gradients - expected).norm() / expected.norm())


def measure_validation(case: Training, model: ConvTasNetStereo, step: Step) -> float | None:
    """MB reserved at the worst moment of training and the validation of a song thereafter."""
    if step.name == "textbook":
        return None
    torch.cuda.empty_cache()  # as training does
    song = 0.1 * torch.randn(model.audio_channels, round(case.song * RATE), device=case.device)
    with autocast(case, step):
        separate(model.eval(), song, "full")
    return peak_reserved(case.device) / 1e6


def peak_reserved(device: str) -> int:
    return torch.cuda.max_memory_reserved() if device == "cuda" else peak_memory(device)


# Training items


class TextbookItems:
    """What one writes first: float64 from soundfile, then tensor operations."""

    def __init__(self, tracks: list, length: int):
        self.tracks, self.length = tracks, length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        draws = torch.rand(4, 4, generator=random, dtype=torch.float64).tolist()
        stems = torch.stack([self.draw(*pair) for pair in zip(LOAD_SOURCES, draws, strict=True)])
        targets = torch.stack([stems[0], stems[1:].sum(0)])
        return targets.sum(0), targets

    def draw(self, source: str, draws: list[float]) -> Tensor:
        import soundfile

        track = self.tracks[int(draws[0] * len(self.tracks))]
        start = int(draws[1] * (track.length - self.length))
        audio, _ = soundfile.read(
            track.path(source), start=start, stop=start + self.length, always_2d=True
        )
        audio = (0.25 + draws[2]) * torch.tensor(audio, dtype=torch.float32).T
        return audio.flip(0) if draws[3] < 0.5 else audio


class ColdItems:
    """Items whose files are dropped from the kernel's page cache before each batch.

    So they are read from the disk, as those of a data set that is larger than the memory.
    """

    def __init__(self, items, files: list[Path]):
        self.items, self.files = items, files

    def __getitem__(self, position):
        self.drop_files()
        return self.items[position]

    def __getitems__(self, positions: list):
        self.drop_files()
        if hasattr(self.items, "__getitems__"):
            return self.items.__getitems__(positions)
        return [self.items[position] for position in positions]

    def drop_files(self) -> None:
        for file in self.files:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def benchmark_load(args: argparse.Namespace) -> None:
    machine = show_machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder), "train", LOAD_TRACKS, max(LOAD_TRACK_SECONDS, args.seconds))
        print(f"\nItems of {args.seconds:g} s; speed is relative to the textbook's. Where the page")
        print("cache is cold, files are read from the disk, unless they are in a tmpfs.")
        rows = print_table(LOAD_COLUMNS, load_rows(Path(folder), args))
    if args.json:
        write_json(args.json, {"machine": machine, "load": rows})


def write_noise(root: Path, split: str, tracks: int, seconds: float) -> None:
    import soundfile

    time = round(seconds * RATE)
    for track in range(tracks):
        folder = root / split / f"{track}"
        folder.mkdir(parents=True)
        mixture = 0
        for source in LOAD_SOURCES:
            noise = torch.randint(-8000, 8000, (time, 2), dtype=torch.int16).numpy()
            soundfile.write(folder / f"{source}.wav", noise, RATE, "PCM_16")
            mixture = mixture + noise
        soundfile.write(folder / "mixture.wav", mixture, RATE, "PCM_16")


def load_rows(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    from local.musdb18_dataset import SegmentDataset, keep_batch
    from local.musdb18_tracks import find_tracks
    from local.train.loaders import EpochSampler

    tracks, length = find_tracks(root, "train", RATE), round(args.seconds * RATE)
    dataset = SegmentDataset(tracks, length, -(-args.items * args.workers // len(tracks)))
    all_items = {"textbook": TextbookItems(tracks, length), "SegmentDataset": dataset}
    torch.set_num_threads(1)  # as in a worker
    os.sync()  # what is not written yet stays in the cache
    files = [path for track in tracks for path in track.paths()]
    cold_items = {name: ColdItems(items, files) for name, items in all_items.items()}
    for page_cache, chosen in {"warm": all_items, "cold": cold_items}.items():
        one_core = {
            name: lambda items=items: map(items.__getitem__, range(args.items))
            for name, items in chosen.items()
        }
        yield from compare_loaders(one_core, args.items, 0, page_cache)

        options = dict(batch_size=LOAD_BATCH, num_workers=args.workers, persistent_workers=True)
        own = dict(sampler=EpochSampler(len(dataset)), collate_fn=keep_batch)
        loaders = {
            "textbook": DataLoader(chosen["textbook"], sampler=range(len(dataset)), **options),
            "SegmentDataset": DataLoader(chosen["SegmentDataset"], **own, **options),
        }
        items = LOAD_BATCH * len(loaders["textbook"])
        starts = {name: loader.__iter__ for name, loader in loaders.items()}
        yield from compare_loaders(starts, items, args.workers, page_cache)


def compare_loaders(
    starts: dict[str, Callable], items: int, workers: int, page_cache: str
) -> Iterator[dict]:
    """A row per loader: the medians over rounds in which they take turns, after one to warm up."""
    times = {name: [] for name in starts}
    for _ in range(LOAD_ROUNDS + 1):
        for name, start in starts.items():
            times[name].append(stopwatch("cpu", lambda start=start: sum(1 for _ in start()))[1])
    seconds = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, taken in seconds.items():
        yield {
            "loader": name,
            "workers": workers,
            "page_cache": page_cache,
            "items_per_s": items / taken,
            "per_core": items / taken / max(workers, 1),
            "speed": seconds["textbook"] / taken,
        }


# Scores


def benchmark_score(args: argparse.Namespace) -> None:
    machine = show_machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        print("\nA track of two stereo sources on one core; speed, memory and deviation are those")
        print("relative to museval's.")
        scores = print_table(SCORE_COLUMNS, score_rows(Path(folder), args))
        print(f"\n{args.tracks} tracks of {max(args.lengths):g} s from wav to JSON.")
        pool = print_table(POOL_COLUMNS, pool_rows(Path(folder), args))
    if args.json:
        write_json(args.json, {"machine": machine, "score": scores, "pool": pool})


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


# What is reported


def show_machine(device: str) -> dict:
    machine = describe_machine(device)
    print(" | ".join(f"{key} {value}" for key, value in machine.items() if value), flush=True)
    return machine


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
