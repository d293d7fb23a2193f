"""Score the estimates of tracks: BSSEval v4 in frames of 1 s, several tracks at a time."""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from threadpoolctl import threadpool_limits

from local.eval.bsseval import RATIOS, bss_eval, energies, framewise_sdr
from local.eval.results import describe_track
from local.eval.score_files import (
    ScoredTrack,
    load_track,
    make_track_store,
    remove_track,
    save_track,
    summarise,
)
from local.eval.tracks import TestTrack, read_track
from local.musdb18_tracks import TARGETS
from local.tools.choices import SCORERS
from local.tools.command_line import UserError
from local.tools.museval_guard import import_museval
from local.tools.progress import report, show_progress
from local.tools.socket_folder import make_socket_folder

ESTIMATES = ".estimates"  # folders in OUT, one per rank
# Memory of a scoring process, and more for each second of its track (measured, and rounded up).
PROCESS_BYTES = 450e6
SECOND_BYTES = {"bsseval": 2e6, "museval": 17e6}
USDR_FLOOR = 1e-7  # the challenges add it to both energies
USDR_SAMPLES = 2**16  # at a time
# What takes seconds to import. The fork server imports it once for all scoring processes. Modules
# of this project are not here: the server may run in a folder where it cannot find them.
IMPORTS = ["museval", "scipy.fft", "soundfile"]


def score_track(track: TestTrack, estimates: np.ndarray, scorer: str = SCORERS[0]) -> tuple:
    """Score the estimates of a track.

    Args:
        scorer: "bsseval", or "museval" for museval's own code, which gives the same numbers.

    Shape:
        - estimates: (2, 2, T): vocals and accompaniment, their channels, time

    Returns:
        (museval.TrackStore, what it has no place for: see `score_files.save_track`).

    Raises:
        ValueError: the track cannot be read, has another length than the estimates, or a source
            or an estimate is silent throughout.
    """
    audio = read_track(track)
    references = np.stack([audio[target].T for target in TARGETS])
    mixture = np.broadcast_to(audio["mixture"].T, references.shape)
    estimates = np.ascontiguousarray(estimates.transpose(0, 2, 1))
    if estimates.shape != references.shape:
        raise ValueError(
            f"its mixture has {estimates.shape[1]} samples, its sources {references.shape[1]}"
        )
    scores = _score(references, estimates, track.rate, scorer)
    mixture_sdr = framewise_sdr(references, mixture, track.rate, track.rate)
    extras = {
        "frames": mixture_sdr.shape[1],
        "mixture_SDR": dict(zip(TARGETS, map(summarise, mixture_sdr), strict=True)),
        "uSDR": whole_track_sdr(references, estimates),
        "mixture_uSDR": whole_track_sdr(references, mixture),
    }
    return make_track_store(track.name, scores), extras


def _score(references: np.ndarray, estimates: np.ndarray, rate: int, scorer: str) -> dict:
    """Return target -> metric -> dB of every frame, as `score_files.read_scores` does."""
    if scorer == "museval":
        ratios = import_museval().evaluate(references, estimates, rate, rate)
    else:
        ratios = bss_eval(references, estimates, rate, rate)
    return {
        target: dict(zip(RATIOS, values, strict=True))
        for target, values in zip(TARGETS, zip(*ratios, strict=True), strict=True)
    }


def whole_track_sdr(references: np.ndarray, estimates: np.ndarray) -> dict[str, float]:
    """Return uSDR: the SDR of a whole track in dB, per target, as in the Music Demixing challenges.

    Mitsufuji et al., "Music Demixing Challenge 2021" (Frontiers in Signal Processing 1, 2022),
    equation 1.

    Shape:
        - references, estimates: (targets, samples, channels)
    """
    starts = range(0, references.shape[1], USDR_SAMPLES)
    parts = [slice(start, start + USDR_SAMPLES) for start in starts]
    total = sum(energies(references[:, part], estimates[:, part]) for part in parts)
    sdr = 10 * np.log10(np.divide(*(total + USDR_FLOOR)))
    return dict(zip(TARGETS, sdr.tolist(), strict=True))


def score_file(out: Path, track: TestTrack, file: Path, scorer: str, record: dict) -> ScoredTrack:
    """Score the estimates in a .npy file, save the scores, remove the file.

    Args:
        record: what made the estimates: see `score_files.save_track`.

    Raises:
        ValueError: see `score_track`.
    """
    try:
        store, extras = score_track(track, np.load(file, mmap_mode="r"), scorer)
    finally:
        file.unlink()
    save_track(out, store, {**record, **extras})
    return load_track(out, track.name)


class ScoringPool:
    """Score tracks in processes of one BLAS thread each, while the caller separates other tracks.

    Estimates wait in files in OUT until a process is free. The processes end when this one ends,
    even where it is killed.

    Args:
        jobs: tracks scored at a time.
        rank: of the caller, where several ranks share OUT.
    """

    def __init__(self, out: Path, jobs: int, scorer: str, rank: int = 0):
        self.out, self.scorer = out, scorer
        self.folder = out / f"{ESTIMATES}.{rank}"
        make_socket_folder()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        self.processes = ProcessPoolExecutor(jobs, context, initializer=_start_process)
        self.futures: list[Future] = []
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
            UserError: a process was killed.
            OSError: the estimates cannot be written.
        """
        file = self.folder / f"{len(self.futures)}.npy"
        try:
            np.save(file, np.stack([estimates[target] for target in TARGETS]))
        except OSError as error:  # numpy sets no errno
            reason = f"{error} (is the disk full?)"
            raise OSError(errno.EIO, reason, str(self.folder)) from None
        with self._report_killed_processes(), _delayed_interrupts():
            future = self.processes.submit(score_file, self.out, track, file, self.scorer, record)
        future.add_done_callback(partial(self._report, track))
        self.futures.append(future)

    def finish(self) -> tuple[list[ScoredTrack], dict[str, str]]:
        """Wait for all scores.

        Returns:
            (the scored tracks, those that failed and why).

        Raises:
            UserError: a process was killed.
            OSError: scores could not be written.
        """
        scored = []
        with (
            self._report_killed_processes(),
            show_progress("scored", len(self.futures), "tracks") as bar,
        ):
            for future in as_completed(self.futures):
                bar.update()
                if not isinstance(future.exception(), ValueError):
                    scored.append(future.result())
        self.processes.shutdown()  # returns when all callbacks have run
        return scored, self.failures

    def fail(self, track: TestTrack, error: Exception) -> None:
        """Count a track as failed, and remove the scores it had."""
        self.failures[track.name] = str(error)
        remove_track(self.out, track.name)
        report(f"{track.name}: not scored: {error}", sys.stderr)

    def _report(self, track: TestTrack, future: Future) -> None:
        if future.cancelled():
            return
        with suppress(BrokenPipeError):  # the main thread gets it as well
            if isinstance(future.exception(), ValueError):
                self.fail(track, future.exception())
            elif not future.exception():
                report(describe_track(future.result()))

    @contextmanager
    def _report_killed_processes(self) -> Iterator[None]:
        try:
            yield
        except (BrokenProcessPool, MemoryError):
            raise UserError(
                "a scoring process was killed or ran out of memory; run the same command again with"
                " a smaller --jobs, and it scores the remaining tracks"
            ) from None


def remove_estimates(out: Path) -> None:
    """Remove the estimates that a killed run has left."""
    for folder in out.glob(f"{ESTIMATES}.*"):
        shutil.rmtree(folder)


@contextmanager
def _delayed_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, and block it in the processes started within.

    Else the fork server would stop during its imports, and a scoring process during its start, each
    with a traceback.
    """
    received = []
    handler = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    # New processes inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def choose_jobs(tracks: list[TestTrack], scorer: str, processes: int = 1) -> int:
    """Choose how many tracks to score at a time, by cores, free memory and number of tracks.

    Args:
        processes: ranks of this run on this machine, which share it.
    """
    longest = max((track.seconds for track in tracks), default=0)
    free = psutil.virtual_memory().available / processes
    fitting = int(free // (PROCESS_BYTES + SECOND_BYTES[scorer] * longest))
    # srun may give each rank its own cores; torchrun does not.
    cores = min(len(os.sched_getaffinity(0)), os.cpu_count() // processes)
    return max(1, min(cores, fitting, len(tracks)))
