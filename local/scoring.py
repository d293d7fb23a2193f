"""Test tracks, and their scores by museval: BSSEval v4 in frames of 1 s.

Stöter, Liutkus & Ito, "The 2018 Signal Separation Evaluation Campaign" (LVA/ICA 2018).
"""

import csv
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile as sf

from local.checkpoint import atomic_path
from local.musdb18_dataset import SOURCES, Track, find_tracks
from local.stems import decode_track, need_ffmpeg, stem_files, track_name

TARGETS = ("vocals", "accompaniment")
METRICS = ("SDR", "SIR", "ISR", "SAR")
RESULTS = ("results.txt", "results.csv", "results.pandas")
FILES = ("mixture", *SOURCES)


@dataclass(frozen=True)
class ScoredTrack:
    """museval's scores of a track, and beside them the SDR of its untouched mixture.

    Args:
        store: a museval.TrackStore.
        mixture_sdr: target -> SDR in dB of every frame, with the mixture as the estimate.
    """

    name: str
    store: object
    mixture_sdr: dict[str, np.ndarray]

    def frames(self, target: str, metric: str) -> np.ndarray:
        """A metric of every frame, in dB; NaN where a source is silent."""
        scores = next(found for found in self.store.scores["targets"] if found["name"] == target)
        return np.array([float(frame["metrics"][metric]) for frame in scores["frames"]])

    def nan_share(self, target: str) -> float:
        """The share of frames without a score."""
        return float(np.isnan(self.frames(target, "SDR")).mean())


def open_test_set(root: Path, rate: int, suffix: str) -> dict[str, Callable[[], dict]]:
    """The test tracks by name, sorted; each a function that reads the track.

    What it reads is {"mixture", "vocals", "accompaniment"} -> (2, T) float64, the samples that
    musdb gives: on the grid of 16-bit integers, whatever the files hold.

    Raises:
        DatasetError: lists what is wrong with the files (of a wav or flac tree).
        UserError: ffmpeg is missing for .stem.mp4 files.
    """
    packed = stem_files(root, "test")
    if packed and not any(path.is_dir() for path in (root / "test").iterdir()):
        need_ffmpeg()
        return {track_name(path): partial(_read_packed, path, rate) for path in packed}
    tracks = find_tracks(root, "test", rate, suffix, FILES)
    return {track.name: partial(_read_track, track) for track in tracks}


def _read_packed(stem_file: Path, rate: int) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        decode_track(stem_file, Path(folder, "test", track_name(stem_file)))
        (track,) = find_tracks(Path(folder), "test", rate, "wav", FILES)
        return _read_track(track)


def _read_track(track: Track) -> dict[str, np.ndarray]:
    audio = {name: _on_16_bit_grid(track.read(name), track.path(name)) for name in FILES}
    accompaniment = sum(audio[source] for source in SOURCES if source != "vocals")
    return {
        "mixture": audio["mixture"],
        "vocals": audio["vocals"],
        "accompaniment": accompaniment,
    }


def _on_16_bit_grid(audio: np.ndarray, path: Path) -> np.ndarray:
    # As ffmpeg converts for musdb: it rounds floats, and drops the low bits of longer integers.
    to_integer = np.rint if sf.info(path).subtype in ("FLOAT", "DOUBLE") else np.floor
    return np.clip(to_integer(audio.astype(np.float64) * 32768), -32768, 32767) / 32768


def score_track(
    name: str, rate: int, audio: dict[str, np.ndarray], estimates: dict[str, np.ndarray]
) -> ScoredTrack:
    """Scores the estimates of a track with `museval.eval_mus_track`.

    Args:
        audio: {"mixture", "vocals", "accompaniment"} -> (2, T).
        estimates: {"vocals", "accompaniment"} -> (2, T).

    Raises:
        ValueError: a source or an estimate is silent for the whole track, or not finite.
    """
    import museval  # needs ffmpeg on the PATH, even to be imported

    for target, estimate in estimates.items():
        if not np.isfinite(estimate).all():
            raise ValueError(f"the estimate of {target} holds NaN or infinity")
    track = SimpleNamespace(
        name=name,
        rate=rate,
        subset="test",
        targets={target: SimpleNamespace(audio=audio[target].T) for target in TARGETS},
    )
    store = museval.eval_mus_track(track, {target: estimates[target].T for target in TARGETS})
    store.validate()
    references = np.stack([audio[target] for target in TARGETS])
    untouched = np.stack([audio["mixture"] for _ in TARGETS])
    sdr = framewise_sdr(references, untouched, window=rate)
    return ScoredTrack(name, store, dict(zip(TARGETS, sdr, strict=True)))


def framewise_sdr(references: np.ndarray, estimates: np.ndarray, window: int) -> np.ndarray:
    """museval's SDR (image, BSSEval v4) of consecutive frames, in dB: it needs no filters.

    Shape:
        - references, estimates: (sources, channels, T)
        - output: (sources, T // window), or one frame where T < window; NaN where the channels of a
          source sum to zero over the whole frame, as museval has it
    """
    sources, channels, time = references.shape
    count = max(time // window, 1)
    framed = (sources, channels, count, -1)
    used = count * window if time >= window else time
    references = references[..., :used].reshape(framed)
    estimates = estimates[..., :used].reshape(framed)
    silent = [
        (audio.sum(axis=1) == 0).all(axis=-1).any(axis=0) for audio in (references, estimates)
    ]
    signal = np.square(references).sum(axis=(1, 3))
    distortion = np.square(references - estimates).sum(axis=(1, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        sdr = 10 * np.log10(signal / distortion)
    return np.where(silent[0] | silent[1], np.nan, sdr)


def write_results(out: Path, scored: list[ScoredTrack], failures: dict[str, str]) -> str:
    """Writes RESULTS; returns the text of results.txt, which is written last.

    Args:
        failures: track -> why it has no scores.
    """
    import museval

    results = museval.EvalStore()
    for track in scored:
        results.add_track(track.store)
    text = _describe(results, scored, failures)
    with atomic_path(out / "results.csv") as temporary:
        _write_csv(temporary, scored)
    with atomic_path(out / "results.pandas") as temporary:
        results.save(temporary)
    with atomic_path(out / "results.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _describe(results, scored: list[ScoredTrack], failures: dict[str, str]) -> str:
    lines = sdr_table(scored) if scored else []
    for frames_agg, tracks_agg in (("median", "median"), ("median", "mean"), ("mean", "median")):
        if scored:
            results.frames_agg, results.tracks_agg = frames_agg, tracks_agg
            lines += ["", *(line.rstrip() for line in str(results).strip().splitlines())]
    if failures:
        lines += ["", f"Not scored: {len(failures)} of {len(scored) + len(failures)} tracks"]
        lines += [f"  {name}: {reason}" for name, reason in failures.items()]
    return "\n".join(lines) + "\n"


def sdr_table(scored: list[ScoredTrack]) -> list[str]:
    """The lines of a table: SDR of the mixture and of the model, per track and over tracks."""
    rows = {track.name: [_sdr_cells(track, target) for target in TARGETS] for track in scored}
    cells = np.array(list(rows.values()))  # (tracks, targets, cells)
    rows["median over tracks"] = _aggregate(np.nanmedian, cells, axis=0)
    rows["mean over tracks"] = _aggregate(np.nanmean, cells, axis=0)
    width = max(len("SDR in dB, median over 1 s frames"), *map(len, rows))
    lines = [
        f"{'SDR in dB, median over 1 s frames':{width}}" + "".join(f"{t:>32}" for t in TARGETS),
        f"{'track':{width}}" + len(TARGETS) * f"{'mixture':>10}{'model':>8}{'gain':>8}{'NaN':>6}",
    ]
    for name, targets in rows.items():
        numbers = (f"{m:>10.2f}{e:>8.2f}{gain:>+8.2f}{nan:>6.0%}" for m, e, gain, nan in targets)
        lines.append(f"{name:{width}}" + "".join(numbers))
    return lines


def _sdr_cells(track: ScoredTrack, target: str) -> tuple[float, float, float, float]:
    """SDR of the mixture, SDR of the model, the gain, the share of NaN frames."""
    mixture = _aggregate(np.nanmedian, track.mixture_sdr[target])
    model = _aggregate(np.nanmedian, track.frames(target, "SDR"))
    return mixture, model, model - mixture, track.nan_share(target)


def _write_csv(path: Path, scored: list[ScoredTrack]) -> None:
    aggregates = {"median": np.nanmedian, "mean": np.nanmean}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [f"{metric}_{name}" for name in aggregates for metric in METRICS]
        columns += [f"mixture_SDR_{name}" for name in aggregates]
        writer.writerow(["track", "target", *columns, "frames", "nan_share"])
        for track in scored:
            for target in TARGETS:
                frames = {metric: track.frames(target, metric) for metric in METRICS}
                values = [_aggregate(f, frames[m]) for f in aggregates.values() for m in METRICS]
                values += [_aggregate(f, track.mixture_sdr[target]) for f in aggregates.values()]
                shown = [f"{value:.5f}" for value in (*values, track.nan_share(target))]
                writer.writerow([track.name, target, *shown[:-1], len(frames["SDR"]), shown[-1]])


def _aggregate(function: Callable, values: np.ndarray, axis: int | None = None):
    """A nan-aware mean or median; NaN, without numpy's warning, where all values are NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(values, axis=axis)
