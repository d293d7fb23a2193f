"""What a command prints, and writes to --json."""

import datetime
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from local.tools.files import atomic_path


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
    with atomic_path(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
