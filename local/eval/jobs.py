"""How many tracks are scored at a time, on which cores, and the memory that each takes."""

import os
from collections.abc import Collection

from local.tools.memory import shared_memory

# Memory of a scoring process of two targets, and more for each second of its track and each target,
# and for the equations of each further target (measured, and rounded up).
PROCESS_BYTES = 450e6
SECOND_BYTES = {"bsseval": 1e6, "museval": 8.5e6}
EQUATIONS_BYTES = 28e6
# Seconds of a core for each second of a track of two targets (measured).
SECONDS = {"bsseval": 0.015, "museval": 0.2}


def scoring_bytes(seconds: float, scorer: str, targets: int = 2) -> float:
    """Return the memory that the scoring of a track takes."""
    equations = EQUATIONS_BYTES * (targets**2 - 2**2)
    return PROCESS_BYTES + equations + SECOND_BYTES[scorer] * targets * seconds


def choose_jobs(
    tracks: Collection, scorer: str, processes: int = 1, separation: float = 0, targets: int = 2
) -> int:
    """Choose how many tracks to score at a time, by cores, free memory and number of tracks.

    Args:
        processes: ranks of this run on this machine, which share it.
        separation: bytes that each of them needs to separate a track at the same time.
        targets: of each track.
    """
    longest = max((track.seconds for track in tracks), default=0)
    free = shared_memory() / processes - separation
    fitting = int(free // scoring_bytes(longest, scorer, targets))
    # srun may give each rank its own cores; torchrun does not.
    cores = min(len(os.sched_getaffinity(0)), os.cpu_count() // processes)
    return max(1, min(cores, fitting, len(tracks)))


def choose_threads(threads: int, separation: float, scorer: str, targets: int = 2) -> int:
    """Choose how many threads separate tracks while others are scored, on one core each.

    Threads share a separation out among them, and each waits for the slowest: where scoring takes
    some of their cores, all are slow. So cores are divided as the work is. Nothing else counts, as
    the number of threads may show in the last digits of the estimates.

    Args:
        threads: that torch may use.
        separation: seconds of a core that it takes for each second of a track.
        targets: of each track.
    """
    scoring = SECONDS[scorer] * targets / 2
    return max(1, round(threads / (1 + scoring / separation)))


def describe_lack(work: str, needed: float, free: float) -> str:
    """Return what memory some work on a track needs and finds; "" where that is enough."""
    if needed <= free:
        return ""
    return f"its {work} needs about {needed / 1e9:.2f} GB of memory, and {free / 1e9:.2f} are free"
