"""Several tracks are scored at a time, while others are separated, as memory allows."""

import errno
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

from local.eval.processes import delayed_interrupts, make_processes
from local.eval.results import describe_track
from local.eval.score_files import ScoredTrack, remove_track
from local.eval.scoring import score_file
from local.eval.tracks import TestTrack
from local.musdb18_tracks import TARGETS
from local.tools.command_line import brief, plural
from local.tools.memory import is_out_of_memory, shared_memory
from local.tools.progress import report, show_progress

ESTIMATES = ".estimates"  # folders in OUT, one per rank
# Memory of a scoring process, and more for each second of its track (measured, and rounded up).
PROCESS_BYTES = 450e6
SECOND_BYTES = {"bsseval": 2e6, "museval": 17e6}


def scoring_bytes(seconds: float, scorer: str) -> float:
    """Return the memory that the scoring of a track takes."""
    return PROCESS_BYTES + SECOND_BYTES[scorer] * seconds


def choose_jobs(
    tracks: list[TestTrack], scorer: str, processes: int = 1, separation: float = 0
) -> int:
    """Choose how many tracks to score at a time, by cores, free memory and number of tracks.

    Args:
        processes: ranks of this run on this machine, which share it.
        separation: bytes that each of them needs to separate a track at the same time.
    """
    longest = max((track.seconds for track in tracks), default=0)
    free = shared_memory() / processes - separation
    fitting = int(free // scoring_bytes(longest, scorer))
    # srun may give each rank its own cores; torchrun does not.
    cores = min(len(os.sched_getaffinity(0)), os.cpu_count() // processes)
    return max(1, min(cores, fitting, len(tracks)))


def describe_lack(work: str, needed: float, free: float) -> str:
    """Return what memory some work on a track needs and finds; "" where that is enough."""
    if needed <= free:
        return ""
    return f"its {work} needs about {needed / 1e9:.2f} GB of memory, and {free / 1e9:.2f} are free"


@dataclass(frozen=True)
class Task:
    """A track whose estimates wait in a file: see `score_file`."""

    track: TestTrack
    file: Path
    record: dict


class ScoringPool:
    """Score tracks in processes of one BLAS thread each, while the caller separates other tracks.

    Estimates wait in files in OUT until a process is free. The processes end when this one ends,
    even where it is killed.

    Where memory runs out in a process, or the kernel kills it for that, the tracks that it may have
    been are scored again at the end, one by one, when nothing else runs. A track for which that
    fails too has no scores.

    Args:
        jobs: tracks scored at a time; half as many after a process was killed.
        scorer, float_references: see `scoring.score_track`.
        rank: of the caller, where several ranks share OUT.
    """

    def __init__(
        self, out: Path, jobs: int, scorer: str, float_references: bool = False, rank: int = 0
    ):
        self.out, self.jobs, self.settings = out, jobs, (scorer, float_references)
        self.folder = out / f"{ESTIMATES}.{rank}"
        self.processes = make_processes(jobs)
        self.submitted = 0
        self.waiting: dict[Future, Task] = {}  # in the order in which processes take them
        self.to_repeat: list[Task] = []
        self.scored: list[ScoredTrack] = []
        self.failures: dict[str, str] = {}

    def __enter__(self):
        self.folder.mkdir()
        return self

    def __exit__(self, kind, error, traceback):
        self.processes.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children() if error else ():
            process.terminate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def submit(self, track: TestTrack, estimates: dict[str, np.ndarray], record: dict) -> None:
        """Queue a track.

        Args:
            estimates: target -> (2, T), finite.
            record: what made them: see `score_files.save_track`.

        Raises:
            OSError: the estimates cannot be written.
        """
        file = self.folder / f"{self.submitted}.npy"
        self.submitted += 1
        try:
            np.save(file, np.stack([estimates[target] for target in TARGETS]))
        except OSError as error:  # numpy sets no errno
            reason = f"{error} (is the disk full?)"
            raise OSError(errno.EIO, reason, str(self.folder)) from None
        self._collect(timeout=0)
        self._queue(Task(track, file, record))

    def wait_for_memory(self, track: TestTrack, separation: float) -> None:
        """Wait, while other tracks are scored, until there is memory to separate and score a track.

        Where there is not enough, the kernel might kill this process for it. What `ulimit` allows
        does not count here: an error tells where that is not enough.

        Args:
            separation: bytes that the separation needs.

        Raises:
            MemoryError: there is not enough to separate it, though nothing is scored.
            ValueError: there is not enough to score it.
        """
        scoring = scoring_bytes(track.seconds, self.settings[0])
        needed = max(separation, scoring)
        while self.waiting and shared_memory() - self._reserved() < needed:
            self._collect()
        if lack := describe_lack("separation", separation, shared_memory()):
            raise MemoryError(lack)
        if lack := describe_lack("scoring", scoring, shared_memory()):
            raise ValueError(f"{lack}{self._advice()}")

    def finish(self) -> tuple[list[ScoredTrack], dict[str, str]]:
        """Wait for all scores.

        Returns:
            (the scored tracks, those that failed and why).

        Raises:
            OSError: scores could not be written.
        """
        with show_progress("scored", len(self.waiting), "tracks") as bar:
            while self.waiting:
                before = len(self.waiting)
                self._collect()
                bar.update(before - len(self.waiting))
        self.processes.shutdown()  # returns when all callbacks have run
        for task in self.to_repeat:
            self._score_alone(task)
        return self.scored, self.failures

    def fail(self, track: TestTrack, reason: str) -> None:
        """Count a track as failed, and remove the scores it had."""
        self.failures[track.name] = reason
        remove_track(self.out, track.name)
        report(f"{track.name}: not scored: {reason}", sys.stderr)

    def _reserved(self) -> float:
        """Return the bytes that the tracks that are scored now may still take."""
        running = islice(self.waiting.values(), self.jobs)
        needed = sum(scoring_bytes(task.track.seconds, self.settings[0]) for task in running)
        taken = 0
        for process in multiprocessing.active_children():
            with suppress(psutil.Error):  # it may have ended
                taken += psutil.Process(process.pid).memory_info().rss
        return max(0, needed - taken)

    def _queue(self, task: Task) -> None:
        with delayed_interrupts():
            try:
                future = self._start(task)
            except BrokenProcessPool:
                self._replace_processes()
                future = self._start(task)
        self.waiting[future] = task

    def _start(self, task: Task) -> Future:
        arguments = self.out, task.track, task.file, self.settings, task.record
        future = self.processes.submit(score_file, *arguments)
        future.add_done_callback(partial(self._report, task))
        return future

    def _report(self, task: Task, future: Future) -> None:
        """Report a track at once, in a thread of the processes."""
        if future.cancelled():
            return
        error = future.exception()
        with suppress(BrokenPipeError):  # the main thread gets it as well
            if isinstance(error, ValueError):
                self.fail(task.track, str(error))
            elif not error:
                report(describe_track(future.result()))
        if isinstance(error, ValueError) or not error:
            task.file.unlink(missing_ok=True)

    def _collect(self, timeout: float | None = None) -> None:
        """Wait for a track at least, and take the scores that there are."""
        done, _ = wait(self.waiting, timeout, FIRST_COMPLETED)
        if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
            self._replace_processes()
        else:
            self._take(done)

    def _take(self, done: set[Future]) -> None:
        for future in done:
            task, error = self.waiting.pop(future), future.exception()
            if not error:
                self.scored.append(future.result())
            elif is_out_of_memory(error):
                self.to_repeat.append(task)
            elif not isinstance(error, ValueError):
                raise error

    def _replace_processes(self) -> None:
        """Continue with fewer processes after one was killed, which ends all of them.

        It is not known which of the tracks that were scored at the time it was.
        """
        for process in multiprocessing.active_children():
            process.kill()  # before Python 3.12, one that is started meanwhile would be waited for
        self.processes.shutdown()
        lost = [
            future
            for future in self.waiting
            if not future.done() or isinstance(future.exception(), BrokenProcessPool)
        ]
        self._take(self.waiting.keys() - set(lost))
        tasks = [self.waiting.pop(future) for future in lost]
        suspects, others = tasks[: self.jobs], tasks[self.jobs :]
        self.to_repeat += suspects
        self.jobs = max(1, self.jobs // 2)
        names = ", ".join(task.track.name for task in suspects) or "none"
        report(
            "a scoring process was killed (out of memory?); from here on"
            f" {plural(self.jobs, 'track')} at a time; to be scored again, alone: {names}",
            sys.stderr,
        )
        self.processes = make_processes(self.jobs)
        for task in others:
            self._queue(task)

    def _score_alone(self, task: Task) -> None:
        needed = scoring_bytes(task.track.seconds, self.settings[0])
        reason = describe_lack("scoring", needed, shared_memory())
        if not reason:
            self.processes = make_processes(1)
            with delayed_interrupts():
                future = self._start(task)
            error = future.exception()
            self.processes.shutdown()
            if isinstance(error, BrokenProcessPool):
                reason = "its scoring process was killed, the second time alone (out of memory?)"
            elif error and is_out_of_memory(error):
                reason = f"out of memory in scoring: {brief(error)}"
            else:
                self.waiting[future] = task
                self._take({future})
        if reason:
            self.fail(task.track, f"{reason}{self._advice()}")

    def _advice(self) -> str:
        return "; --scorer bsseval needs less" if self.settings[0] == "museval" else ""


def remove_estimates(out: Path) -> None:
    """Remove the estimates that a killed run has left."""
    for folder in out.glob(f"{ESTIMATES}.*"):
        shutil.rmtree(folder)
