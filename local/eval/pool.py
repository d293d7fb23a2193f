"""Several tracks are scored at a time, while others are separated, as memory allows."""

import errno
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

from local.eval.jobs import describe_lack, scoring_bytes
from local.eval.processes import delayed_interrupts, make_processes
from local.eval.results import describe_track
from local.eval.score_files import ScoredTrack, remove_track
from local.eval.scoring import score_file
from local.eval.tracks import TestTrack
from local.tools.command_line import brief, plural
from local.tools.memory import is_out_of_memory, shared_memory
from local.tools.progress import report, show_progress

ESTIMATES = ".estimates"  # folders in OUT, one per rank


@dataclass(frozen=True)
class Task:
    """A track to score, and the folder in which its estimates wait, if any: see `score_file`."""

    track: TestTrack
    estimates: Path | None
    record: dict

    def clean_up(self) -> None:
        if self.estimates:
            shutil.rmtree(self.estimates, ignore_errors=True)


class ScoringPool:
    """Score tracks in processes of one BLAS thread each, while the caller separates other tracks.

    Estimates wait in folders in OUT until a process is free. The processes end when this one ends,
    even where it is killed.

    Where memory runs out in a process, or the kernel kills it for that, the tracks that it may have
    been are scored again at the end, one by one, when nothing else runs. A track for which that
    fails too has no scores.

    Args:
        jobs: tracks scored at a time; half as many after a process was killed.
        scorer, float_references: see `scoring.score_track`.
        rank: of the caller, where several ranks share OUT.
        targets: of each track, the accompaniment included.
        remove: what removes the scores of a track that has failed, given OUT and its name.
    """

    def __init__(
        self,
        out: Path,
        jobs: int,
        scorer: str,
        float_references: bool = False,
        rank: int = 0,
        targets: int = 2,
        remove: Callable[[Path, str], None] = remove_track,
    ):
        self.out, self.jobs, self.settings = out, jobs, (scorer, float_references)
        self.targets, self.remove = targets, remove
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

    def submit(
        self, track: TestTrack, estimates: dict[str, np.ndarray] | None, record: dict
    ) -> None:
        """Queue a track.

        Args:
            estimates: target -> (2, T), finite; None where the track reads its own.
            record: what made them: see `score_files.save_track`.

        Raises:
            OSError: the estimates cannot be written.
        """
        folder = self._keep(estimates) if estimates else None
        self._collect(timeout=0)
        self._queue(Task(track, folder, record))

    def _keep(self, estimates: dict[str, np.ndarray]) -> Path:
        """Write estimates as TARGET.npy to a folder, and return it."""
        folder = self.folder / str(self.submitted)
        self.submitted += 1
        try:
            folder.mkdir()
            for target, estimate in estimates.items():
                np.save(folder / f"{target}.npy", estimate)
        except OSError as error:  # numpy sets no errno
            reason = f"{error} (is the disk full?)"
            raise OSError(errno.EIO, reason, str(self.folder)) from None
        return folder

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
        scoring = self._scoring_bytes(track)
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
        self.remove(self.out, track.name)
        report(f"{track.name}: not scored: {reason}", sys.stderr)

    def _scoring_bytes(self, track: TestTrack) -> float:
        return scoring_bytes(track.seconds, self.settings[0], self.targets)

    def _reserved(self) -> float:
        """Return the bytes that the tracks that are scored now may still take."""
        running = islice(self.waiting.values(), self.jobs)
        needed = sum(self._scoring_bytes(task.track) for task in running)
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
        arguments = self.out, task.track, task.estimates, self.settings, task.record
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
            task.clean_up()

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
        needed = self._scoring_bytes(task.track)
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
