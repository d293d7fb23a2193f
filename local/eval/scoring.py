"""Scores of the test tracks: BSSEval v4 in frames of 1 s, many tracks at a time.

Every scored track has two files: OUT/test/TRACK.json, as museval writes it, and beside it TRACK.yml
with what made these scores, so that a run that was stopped need not start over.
"""

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
from tqdm import tqdm

from local.eval.bsseval import RATIOS, bss_eval, energies, framewise_sdr
from local.eval.results import (
    ScoredTrack,
    describe_track,
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

ESTIMATES = ".estimates"  # folders in OUT, one per rank
# What a scoring process takes in all, and for each second of its track (measured, and rounded up).
PROCESS_BYTES = 450e6
SECOND_BYTES = {"bsseval": 2e6, "museval": 17e6}
USDR_FLOOR = 1e-7  # the challenges add it to both energies
USDR_SAMPLES = 2**16  # at a time
# What takes seconds to import; scoring processes are forked after it. Not the modules of this
# project, which the process that forks them may not find.
IMPORTS = ["museval", "torch", "huggingface_hub.hub_mixin", "scipy.fft", "soundfile"]


def score_track(track: TestTrack, estimates: np.ndarray, scorer: str = SCORERS[0]) -> tuple:
    """Scores the estimates of a track.

    Args:
        scorer: "bsseval", or "museval" for museval's own code, which gives the same numbers.

    Shape:
        - estimates: (2, 2, T): vocals and accompaniment, their channels, time

    Returns:
        (museval.TrackStore, what it has no place for: see `results.save_track`).

    Raises:
        ValueError: the track cannot be read, has another length than the estimates, or a source
            or an estimate is silent throughout.
    """
    audio = read_track(track)
    references = np.stack([audio[target].T for target in TARGETS])
    mixture = np.broadcast_to(audio["mixture"].T, references.shape)
    estimates = np.ascontiguousarray(estimates.transpose(0, 2, 1))
    if estimates.shape != references.shape:
        raise ValueError(f"its mixture has {estimates.shape[1]} samples, its sources others")
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
    """target -> metric -> dB of every frame, as `results.read_scores` has it."""
    if scorer == "museval":
        import museval  # needs ffmpeg on the PATH, even to be imported

        ratios = museval.evaluate(references, estimates, rate, rate)
    else:
        ratios = bss_eval(references, estimates, rate, rate)
    return {
        target: dict(zip(RATIOS, values, strict=True))
        for target, values in zip(TARGETS, zip(*ratios, strict=True), strict=True)
    }


def whole_track_sdr(references: np.ndarray, estimates: np.ndarray) -> dict[str, float]:
    """uSDR: the SDR of a whole track in dB, per target, as in the Music Demixing challenges.

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
    """Scores the estimates in a .npy file, saves the scores, removes the file.

    Args:
        record: what made the estimates, to be kept beside the scores.

    Raises:
        ValueError: as of `score_track`.
    """
    try:
        store, extras = score_track(track, np.load(file, mmap_mode="r"), scorer)
    finally:
        file.unlink()
    save_track(out, store, {**record, **extras})
    return load_track(out, track.name)


class ScoringPool:
    """Scores tracks in processes of one BLAS thread each, while the caller goes on to others.

    Estimates wait for their turn in files in OUT. Processes end with this one, however it ends.

    Args:
        jobs: tracks at a time.
        rank: of the caller, where several share OUT.
    """

    def __init__(self, out: Path, jobs: int, scorer: str, rank: int = 0):
        self.out, self.scorer = out, scorer
        self.folder = out / f"{ESTIMATES}.{rank}"
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
        """Queues a track.

        Args:
            estimates: target -> (2, T), finite.
            record: what made them, to be kept beside the scores: see `results.save_track`.

        Raises:
            UserError: a process was killed.
            OSError: the estimates cannot be written.
        """
        file = self.folder / f"{len(self.futures)}.npy"
        try:
            np.save(file, np.stack([estimates[target] for target in TARGETS]))
        except OSError as error:  # numpy gives no errno
            reason = f"{error} (is the disk full?)"
            raise OSError(errno.EIO, reason, str(self.folder)) from None
        with self._clear_errors(), _interrupts_later():
            future = self.processes.submit(score_file, self.out, track, file, self.scorer, record)
        future.add_done_callback(partial(self._report, track))
        self.futures.append(future)

    def finish(self) -> tuple[list[ScoredTrack], dict[str, str]]:
        """Waits for all scores.

        Returns:
            (the scored tracks, those that failed and why).

        Raises:
            UserError: a process was killed.
            OSError: scores could not be written.
        """
        scored = []
        with (
            self._clear_errors(),
            tqdm(total=len(self.futures), desc="scored", unit="track") as bar,
        ):
            for future in as_completed(self.futures):
                bar.update()
                if not isinstance(future.exception(), ValueError):
                    scored.append(future.result())
        self.processes.shutdown()  # after it, all is reported
        return scored, self.failures

    def fail(self, track: TestTrack, error: Exception) -> None:
        """Counts a track as failed, and removes what scores it had."""
        self.failures[track.name] = str(error)
        remove_track(self.out, track.name)
        tqdm.write(f"{track.name}: not scored: {error}", file=sys.stderr)

    def _report(self, track: TestTrack, future: Future) -> None:
        if future.cancelled():
            return
        with suppress(BrokenPipeError):  # where it matters, the caller meets it too
            if isinstance(future.exception(), ValueError):
                self.fail(track, future.exception())
            elif not future.exception():
                tqdm.write(describe_track(future.result()))

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (BrokenProcessPool, MemoryError):
            raise UserError(
                "a scoring process was killed or ran out of memory; the same command with a smaller"
                " --jobs scores what is missing"
            ) from None


def remove_estimates(out: Path) -> None:
    """Removes what a killed run left for scoring."""
    for folder in out.glob(f"{ESTIMATES}.*"):
        shutil.rmtree(folder)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Keeps Ctrl-C waiting, and from what is started meanwhile: the server that forks the scoring
    processes would else die of it within its imports, and a process half started of its parent's
    end, with a traceback each.
    """
    heard = []
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new process keeps
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def choose_jobs(tracks: list[TestTrack], scorer: str, processes: int = 1) -> int:
    """How many tracks to score at a time: as cores, free memory and their number allow.

    Args:
        processes: of this run on this machine, which share it.
    """
    longest = max((track.seconds for track in tracks), default=0)
    free = psutil.virtual_memory().available / processes
    fitting = int(free // (PROCESS_BYTES + SECOND_BYTES[scorer] * longest))
    # srun may have given each process cores of its own; torchrun does not.
    cores = min(len(os.sched_getaffinity(0)), os.cpu_count() // processes)
    return max(1, min(cores, fitting, len(tracks)))
