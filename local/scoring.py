"""The test tracks and their scores: BSSEval v4 in frames of 1 s, many tracks at a time.

Every scored track has two files: OUT/test/TRACK.json, as museval writes it, and beside it TRACK.yml
with what made these scores, so that a run that was stopped need not start over.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import soundfile as sf
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from local.bsseval import bss_eval, energies, framewise_sdr
from local.config import UserError
from local.musdb18_dataset import SOURCES, Track, find_tracks
from local.results import (
    TARGETS,
    ScoredTrack,
    aggregate,
    describe_track,
    load_track,
    make_track_store,
    remove_track,
    save_track,
)
from local.stems import STREAMS, decode_track, need_ffmpeg, stem_files, track_name

SCORERS = ("bsseval", "museval")
FILES = ("mixture", *SOURCES)
ESTIMATES = ".estimates"  # folders in OUT, one per rank
PACKED_BYTES = 160_000  # of a second of a .stem.mp4 file: five streams of 256 kbit/s
# What a scoring process takes in all, and for each second of its track (measured, and rounded up).
PROCESS_BYTES = 450e6
SECOND_BYTES = {"bsseval": 2e6, "museval": 17e6}
USDR_FLOOR = 1e-7  # the challenges add it to both energies
USDR_SAMPLES = 2**16  # at a time
# What takes seconds to import; scoring processes are forked after it. Not the modules of this
# project, which the process that forks them may not find.
IMPORTS = ["museval", "torch", "huggingface_hub.hub_mixin", "scipy.fft", "soundfile"]


@dataclass(frozen=True)
class PackedTrack:
    """A track in a .stem.mp4 file; its length, in samples, is what the file's size suggests."""

    path: Path
    rate: int

    @property
    def name(self) -> str:
        return track_name(self.path)

    @property
    def length(self) -> int:
        return self.path.stat().st_size * self.rate // PACKED_BYTES

    @property
    def seconds(self) -> float:
        return self.length / self.rate


def open_test_set(root: Path, rate: int, suffix: str) -> list[Track | PackedTrack]:
    """The test tracks, sorted by name.

    Raises:
        DatasetError: lists what is wrong with the files (of a wav or flac tree).
        UserError: ffmpeg is missing for .stem.mp4 files.
    """
    packed = stem_files(root, "test")
    if packed and not any(path.is_dir() for path in (root / "test").iterdir()):
        need_ffmpeg()
        return [PackedTrack(path, rate) for path in packed]
    return find_tracks(root, "test", rate, suffix, FILES)


def read_mixture(track: Track | PackedTrack) -> np.ndarray:
    """(2, T) float32, the samples that musdb gives: see `read_track`."""
    with unpacked(track, ["mixture"]) as files:
        return _read_16_bit(files, "mixture")


def read_track(track: Track | PackedTrack) -> dict[str, np.ndarray]:
    """{"mixture", "vocals", "accompaniment"} -> (2, T) float32, the samples that musdb gives.

    These are on the grid of 16-bit integers, whatever the files hold, and float32 holds them and
    their sums exactly.

    Raises:
        ValueError: it cannot be read.
    """
    with unpacked(track, FILES) as files:
        others = (_read_16_bit(files, source) for source in SOURCES if source != "vocals")
        return {
            "mixture": _read_16_bit(files, "mixture"),
            "vocals": _read_16_bit(files, "vocals"),
            "accompaniment": sum(others),
        }


@contextmanager
def unpacked(track: Track | PackedTrack, names: Sequence[str]) -> Iterator[Track]:
    """A track as a folder of files, of which only those in `names` need be there."""
    if isinstance(track, Track):
        yield track
        return
    with tempfile.TemporaryDirectory() as folder:
        streams = [name for name in STREAMS if name in names]
        decode_track(track.path, Path(folder, "test", track.name), streams)
        (files,) = find_tracks(Path(folder), "test", track.rate, "wav", streams)
        yield files


def _read_16_bit(track: Track, name: str) -> np.ndarray:
    # As ffmpeg converts for musdb: it rounds floats, and drops the low bits of longer integers.
    audio, kind = track.read(name), sf.info(track.path(name)).subtype
    if kind == "PCM_16":
        return audio
    to_integer = np.rint if kind in ("FLOAT", "DOUBLE") else np.floor
    scaled = to_integer(audio.astype(np.float64) * 32768)
    return (np.clip(scaled, -32768, 32767) / 32768).astype(np.float32)


def score_track(
    track: Track | PackedTrack, estimates: np.ndarray, scorer: str = SCORERS[0]
) -> tuple:
    """Scores the estimates of a track.

    Args:
        scorer: "bsseval", or "museval" for museval's own code, which gives the same numbers.

    Shape:
        - estimates: (2, 2, T): vocals and accompaniment, their channels, time

    Returns:
        (museval.TrackStore, what it has no place for: see `results.save_track`).

    Raises:
        ValueError: the track cannot be read, or a source or an estimate is silent throughout.
    """
    audio = read_track(track)
    references = np.stack([audio[target].T for target in TARGETS])
    mixture = np.broadcast_to(audio["mixture"].T, references.shape)
    estimates = np.ascontiguousarray(estimates.transpose(0, 2, 1))
    scores = _score(references, estimates, track.rate, scorer)
    mixture_sdr = framewise_sdr(references, mixture, track.rate, track.rate)
    functions = {"median": np.nanmedian, "mean": np.nanmean}
    extras = {
        "frames": mixture_sdr.shape[1],
        "mixture_SDR": {
            target: {name: float(aggregate(f, sdr)) for name, f in functions.items()}
            for target, sdr in zip(TARGETS, mixture_sdr, strict=True)
        },
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
    metrics = ("SDR", "ISR", "SIR", "SAR")
    by_target = zip(*ratios, strict=True)
    return {
        target: dict(zip(metrics, values, strict=True))
        for target, values in zip(TARGETS, by_target, strict=True)
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


def score_file(
    out: Path, track: Track | PackedTrack, file: Path, scorer: str, record: dict
) -> ScoredTrack:
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

    def submit(
        self, track: Track | PackedTrack, estimates: dict[str, np.ndarray], record: dict
    ) -> None:
        """Queues a track.

        Args:
            estimates: target -> (2, T), finite.
            record: what made them, to be kept beside the scores: see `results.save_track`.

        Raises:
            UserError: a process was killed.
        """
        file = self.folder / f"{len(self.futures)}.npy"
        np.save(file, np.stack([estimates[target] for target in TARGETS]))
        with self._clear_errors():
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

    def fail(self, track: Track | PackedTrack, error: Exception) -> None:
        """Counts a track as failed, and removes what scores it had."""
        self.failures[track.name] = str(error)
        remove_track(self.out, track.name)
        tqdm.write(f"{track.name}: not scored: {error}", file=sys.stderr)

    def _report(self, track: Track | PackedTrack, future: Future) -> None:
        if future.cancelled():
            return
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


def remove_estimates(out: Path, rank: int, ranks: int) -> None:
    """Removes what killed runs left for scoring; between them, all ranks remove all of it."""
    for folder in out.glob(f"{ESTIMATES}.*"):
        if int(folder.suffix[1:]) % ranks == rank:
            shutil.rmtree(folder)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def choose_jobs(tracks: list[Track | PackedTrack], scorer: str) -> int:
    """How many processes have cores, free memory and something to do."""
    longest = max((track.seconds for track in tracks), default=0)
    fitting = psutil.virtual_memory().available // (PROCESS_BYTES + SECOND_BYTES[scorer] * longest)
    # Those that torchrun starts on this machine share it.
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cores, int(fitting), len(tracks)))
