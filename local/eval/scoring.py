"""Scores of a track: museval's numbers in frames of 1 s, and what it has no place for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from local.eval.bsseval import RATIOS, bss_eval, framewise_sdr, is_silent
from local.eval.score_files import (
    load_track,
    make_track_store,
    order_targets,
    save_track,
    summarise,
)
from local.eval.tracks import TestTrack, read_track
from local.eval.whole_track import si_sdr, usdr
from local.musdb18_tracks import TARGETS
from local.tools.choices import SCORERS
from local.tools.museval_guard import import_museval

MUSEVAL_ORDER = ("vocals", "drums", "bass", "other")  # that of musdb; then come other targets
WHOLE_TRACK = {"uSDR": usdr, "SI_SDR": si_sdr}


@dataclass
class Signals:
    """What a track is scored from.

    Args:
        clipped: file -> how many of its samples were clipped.

    Shape:
        - mixture: (channels, T)
        - references, estimates: target -> (channels, T)
    """

    rate: int
    mixture: np.ndarray
    references: dict[str, np.ndarray]
    estimates: dict[str, np.ndarray]
    clipped: dict[str, int] = field(default_factory=dict)


def score_track(
    track: TestTrack,
    estimates: dict[str, np.ndarray],
    scorer: str = SCORERS[0],
    float_references: bool = False,
) -> tuple:
    """Score the estimates of a track: see `score_signals`.

    Args:
        estimates: target -> (2, T). Targets that the track does not have are not scored.
        float_references: read the track as it is, instead of on the grid of 16 bits.

    Raises:
        ValueError: the track cannot be read, has another length than the estimates, or see
            `score_signals`.
    """
    audio, clipped = read_track(track, float_references, with_stems=len(estimates) > len(TARGETS))
    mixture = audio.pop("mixture")
    found, expected = (next(iter(x.values())).shape[-1] for x in (estimates, audio))
    if found != expected:
        raise ValueError(f"its mixture has {found} samples, its sources {expected}")
    return score_signals(
        track.name, Signals(track.rate, mixture, audio, estimates, clipped), scorer
    )


def score_signals(name: str, signals: Signals, scorer: str = SCORERS[0]) -> tuple:
    """Score the targets that have both a reference and an estimate.

    Args:
        name: of the track.
        scorer: "bsseval", or "museval" for museval's own code, which gives the same numbers.

    Returns:
        (museval.TrackStore, what it has no place for: see `score_files.save_track`).

    Raises:
        ValueError: vocals or accompaniment, or all but one of other targets, are silent throughout;
            or a sample is NaN or infinity.
    """
    silent = dict(find_silent(signals))
    lacking = order_targets(signals.estimates.keys() - signals.references)
    scores = {}
    extras = {"clipped": signals.clipped, "silent": silent, "without_reference": lacking}
    for compared, wanted in plan_passes(signals.references.keys() & signals.estimates, silent):
        references, estimates = (
            np.stack([x[target].T for target in compared])
            for x in (signals.references, signals.estimates)
        )
        mixture = np.broadcast_to(signals.mixture.T, references.shape)
        ratios = _score(references, estimates, signals.rate, scorer)
        mixture_sdr = framewise_sdr(references, mixture, signals.rate, signals.rate)
        extras["frames"] = mixture_sdr.shape[1]
        found = {"mixture_SDR": map(summarise, mixture_sdr)}
        for metric, function in WHOLE_TRACK.items():
            found[metric] = function(references, estimates).tolist()
            found[f"mixture_{metric}"] = function(references, mixture).tolist()
        for metric, values in found.items():
            by_target = dict(zip(compared, values, strict=True))
            extras.setdefault(metric, {}).update({t: by_target[t] for t in wanted})
        frames = dict(zip(compared, zip(*ratios, strict=True), strict=True))
        scores |= {t: dict(zip(RATIOS, frames[t], strict=True)) for t in wanted}
    return make_track_store(name, scores), extras


def plan_passes(
    targets: Iterable[str], silent: Iterable[str] = ()
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield museval's passes: (the targets compared with each other, those that it scores there).

    As museval does, vocals and accompaniment are compared with each other, and apart from that the
    vocals with the stems of the accompaniment.

    Args:
        silent: targets that no pass of stems can have.

    Raises:
        ValueError: fewer than two targets are left.
    """
    known = [target for target in MUSEVAL_ORDER if target in targets]
    stems = [*known, *sorted(set(targets) - set(known))]
    has_pair = set(TARGETS) <= set(targets)
    if has_pair:
        stems.remove("accompaniment")
    audible = [target for target in stems if target not in silent]
    if len(audible) > 1:
        yield audible, [target for target in audible if not (has_pair and target in TARGETS)]
    elif not has_pair:
        raise ValueError(
            "BSSEval needs two targets or more that are not silent throughout; there is only"
            f" {', '.join(audible) or 'none'}"
        )
    if has_pair:
        yield list(TARGETS), list(TARGETS)


def find_silent(signals: Signals) -> Iterator[tuple[str, str]]:
    """Yield (target, "reference" or "estimate") of the stems that are silent throughout.

    museval cannot score them, as there is nothing to compare with. Without vocals or accompaniment
    a track has no scores at all: see `score_signals`.
    """
    for target in sorted(signals.references.keys() & signals.estimates):
        kinds = {"reference": signals.references, "estimate": signals.estimates}
        for kind, of_kind in kinds.items():
            if is_silent(of_kind[target].T):
                yield target, kind
                break


def _score(references: np.ndarray, estimates: np.ndarray, rate: int, scorer: str) -> tuple:
    """Return SDR, ISR, SIR and SAR in dB of every frame, as `bss_eval` does."""
    score = import_museval().evaluate if scorer == "museval" else bss_eval
    return score(references, estimates, rate, rate)


def score_file(out: Path, track, estimates: Path | None, settings: tuple, record: dict):
    """Score a track, and save the scores.

    Args:
        track: a TestTrack; or one that reads its `Signals` itself.
        estimates: the folder of TARGET.npy of a TestTrack.
        settings: scorer and float_references: see `score_track`.
        record: what made the estimates: see `score_files.save_track`.

    Raises:
        ValueError: see `score_track`.
    """
    scorer, float_references = settings
    if estimates is None:
        store, extras = score_signals(track.name, track.read_signals(), scorer)
    else:
        files = {file.stem: np.load(file, mmap_mode="r") for file in estimates.glob("*.npy")}
        store, extras = score_track(track, files, scorer, float_references)
    save_track(out, store, {**record, **extras})
    return load_track(out, track.name)
