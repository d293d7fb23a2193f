"""Options of the commands, and which values they take."""

import argparse

import torch

from benchmarks.cases import SIZES
from local.fast.packed import find_precision_fault
from local.tools.choices import PRECISIONS

SHORTEST, LONGEST = 0.01, 3600.0  # seconds; below, there might be no frame to measure


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"benchmark.py: error: {message}\n")


def add_common(parser: argparse.ArgumentParser, with_repeats: bool = True) -> None:
    add = parser.add_argument
    if with_repeats:
        add("--repeats", type=count, default=3, help="the median is shown [%(default)s]")
    add("--device", choices=["cpu", "cuda", "all"], default="all", help="[%(default)s]")
    for name, size in SIZES.items():
        add(f"--{name}", type=count, default=size, help="of the model [%(default)s]")


def read_sizes(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in SIZES}


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="[both, where the device has bf16]",
    )


def choose_precisions(wanted: list[str], device: str) -> list[str]:
    return [name for name in wanted if not find_precision_fault(name, torch.device(device))]


def choose_devices(wanted: str) -> list[str]:
    devices = ["cpu", "cuda"] if wanted == "all" else [wanted]
    return [name for name in devices if name == "cpu" or torch.cuda.is_available()]


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
