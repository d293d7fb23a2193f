"""A training step in every setting, and the textbook."""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import textbook
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import MODELS, RATE, Case, count_gflop, matrix_rate
from benchmarks.measuring import measure_apart, median_row, peak_memory, start_memory, stopwatch
from benchmarks.options import (
    add_common,
    add_precision,
    choose_devices,
    choose_precisions,
    count,
    read_sizes,
    seconds,
)
from benchmarks.report import print_table
from local.fast.choose import choose_forward, find_compiler_fault
from local.fast.graphed import give_back_memory
from local.fast.training import allow_tf32_products
from local.inference import separate
from local.tasnet import ConvTasNetStereo
from local.tools.choices import MEMORY

TRAINING_SHAPES = {"cpu": (1, 1.0), "cuda": (4, 5.0)}  # batch size, seconds of an item
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
STEPS = 3  # after the first
COLUMNS = {
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


def add_options(commands) -> None:
    parser = commands.add_parser("train", help="a training step in every setting, and the textbook")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--seconds", type=seconds, help="of an item [1 on a CPU, 5 on a GPU]")
    add("--batch", type=count, help="items [1 on a CPU, 4 on a GPU]")
    add("--models", choices=MODELS, nargs="+", default=list(MODELS), help="[both]")
    add("--memory", choices=MEMORY, nargs="+", default=list(MEMORY), help="[all]")
    add("--compile", choices=["no", "yes", "both"], default="both", help="[%(default)s]")
    add("--song", type=seconds, default=420.0, help="validated after steps on a GPU [%(default)g]")
    add_precision(parser)
    add_common(parser)


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


def run(args: argparse.Namespace) -> dict:
    sizes = read_sizes(args)
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
            rows += print_table(COLUMNS, step_rows(cases, choose_steps(device, args), args))
    return {"train": rows}


def choose_steps(device: str, args: argparse.Namespace) -> list[Step]:
    names = {"no": ["plain"], "yes": ["compiled"], "both": ["plain", "compiled"]}[args.compile]
    if "compiled" in names and (fault := find_compiler_fault(torch.device(device))):
        names.remove("compiled")
        print(f"without torch.compile: {fault}")
    precisions = choose_precisions(args.precision, device)
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
    forward = choose_step_forward(case, model, step)
    take = make_step(case, model, step, forward)
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
        "song_mb": measure_validation(case, model, step, forward),
        "compile_s": first_s - step_s if step.name == "compiled" else None,
        "error": error,
    }


def choose_step_forward(case: Training, model: ConvTasNetStereo, step: Step) -> Callable:
    """From mixtures to estimates: the textbook's, or that of train.py."""
    if step.name == "textbook":
        return partial(textbook.separate, dict(model.named_parameters()), case.conf)
    compile_ = "yes" if step.name == "compiled" else "no"
    training = {"memory": step.memory, "compile": compile_, "fast": "yes"}
    return choose_forward(model, training, torch.device(case.device))[0]


def make_step(
    case: Training, model: ConvTasNetStereo, step: Step, separate_batch: Callable
) -> Callable:
    """A function from mixture and targets to the loss, which trains the model."""
    fused = step.name != "textbook"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-9, fused=fused)

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


def measure_validation(
    case: Training, model: ConvTasNetStereo, step: Step, forward: Callable
) -> float | None:
    """MB that a GPU reserves at the worst moment of training and validation of a song after it."""
    if case.device != "cuda" or step.name == "textbook":
        return None
    give_back_memory(forward)  # as training does
    song = 0.1 * torch.randn(model.audio_channels, round(case.song * RATE), device=case.device)
    with autocast(case, step):
        separate(model.eval(), song, "full")
    return peak_reserved(case.device) / 1e6


def peak_reserved(device: str) -> int:
    return torch.cuda.max_memory_reserved() if device == "cuda" else peak_memory(device)
