"""Seconds and bytes of a piece of work, and the process that it runs in."""

import ctypes
import multiprocessing
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def measure_apart(function: Callable[..., dict], *args) -> dict:
    # The server forks itself anew for every process, small and with torch already imported. Any
    # other child would inherit the peak of this process or take seconds to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "huggingface_hub.hub_mixin"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        return pool.submit(function, *args).result()


def _end_with_parent() -> None:
    """Lets a measurement end where the benchmark is killed; it would slow the next one."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    ctypes.CDLL(None).malloc_trim(0)  # or what comparing the formulas has freed would be in use
    Path("/proc/self/clear_refs").write_text("5")  # or the peak of that would count
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def median_row(rows: list[dict]) -> dict:
    return {
        key: statistics.median(row[key] for row in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    }
