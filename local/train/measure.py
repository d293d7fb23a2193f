"""Time and memory of a run."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
import torch


def read_clock_after_device(device: torch.device) -> float:
    """The time in seconds, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_peak_memory(trainer: pl.Trainer) -> float:
    """Bytes, the maximum over ranks: of the GPU where there is one, else of the process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    peak = torch.tensor(float(peak), device=device)
    return trainer.strategy.reduce(peak, reduce_op="max").item()


def reset_peak_memory() -> None:
    """Resets Linux' peak of this process: before training, the comparison of the fast path
    with the model takes more memory than some runs do.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
