"""Scores of a track: museval's numbers in frames of 1 s, and what it has no place for."""

from pathlib import Path

import numpy as np

from local.eval.bsseval import RATIOS, bss_eval, energies, framewise_sdr
from local.eval.score_files import (
    ScoredTrack,
    load_track,
    make_track_store,
    save_track,
    summarise,
)
from local.eval.tracks import TestTrack, read_track
from local.musdb18_tracks import TARGETS
from local.tools.choices import SCORERS
from local.tools.museval_guard import import_museval

USDR_FLOOR = 1e-7  # the challenges add it to both energies
USDR_SAMPLES = 2**16  # at a time


def score_track(
    track: TestTrack,
    estimates: np.ndarray,
    scorer: str = SCORERS[0],
    float_references: bool = False,
) -> tuple:
    """Score the estimates of a track.

    Args:
        scorer: "bsseval", or "museval" for museval's own code, which gives the same numbers.
        float_references: read the track as it is, instead of on the grid of 16 bits.

    Shape:
        - estimates: (2, 2, T): vocals and accompaniment, their channels, time

    Returns:
        (museval.TrackStore, what it has no place for: see `score_files.save_track`).

    Raises:
        ValueError: the track cannot be read, has another length than the estimates, or a source
            or an estimate is silent throughout.
    """
    audio, clipped = read_track(track, float_references)
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
        "clipped": clipped,
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


def score_file(
    out: Path, track: TestTrack, file: Path, settings: tuple, record: dict
) -> ScoredTrack:
    """Score the estimates in a .npy file, and save the scores.

    Args:
        settings: scorer and float_references: see `score_track`.
        record: what made the estimates: see `score_files.save_track`.

    Raises:
        ValueError: see `score_track`.
    """
    store, extras = score_track(track, np.load(file, mmap_mode="r"), *settings)
    save_track(out, store, {**record, **extras})
    return load_track(out, track.name)
