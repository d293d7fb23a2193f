"""The two files of a scored track, and when the scores in them are still valid.

OUT/test/TRACK.json holds the scores, as museval writes them. OUT/test/TRACK.yml is their record: it
holds what made them (checkpoint, method, files of the track), and what museval's file has no place
for. A run that was stopped resumes by it.
"""

import gzip
import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from local.musdb18_tracks import SOURCES, TARGETS, UNFIT_FOR_NAMES
from local.tools.choices import PRECISIONS
from local.tools.files import atomic_path
from local.tools.museval_guard import import_museval
from local.tools.values import find_changed_setting

METRICS = ("SDR", "SIR", "ISR", "SAR")
# What Python raises for data of another structure than expected, for huge numbers, and for deep
# nesting.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
# Settings that records of earlier versions do not have.
DEFAULTS = {"float_references": False, "targets": list(TARGETS), "precision": PRECISIONS[0]}
FINAL_METRICS = "final_metrics.json"  # in OUT: medians and means over tracks
AGGREGATES = {"median": np.nanmedian, "mean": np.nanmean}

Scores = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class ScoredTrack:
    """A track with its scores, see `read_scores`, and their record, see `save_track`."""

    name: str
    scores: Scores
    record: dict

    @property
    def targets(self) -> list[str]:
        """Those that have scores, in the order in which they are shown."""
        return order_targets(self.scores)

    @property
    def unscored(self) -> dict[str, str]:
        """Targets without scores -> why."""
        silent = {target: f"its {kind} is silent" for target, kind in self.record["silent"].items()}
        lacking = self.record.get("without_reference", ())  # records of earlier versions
        return silent | dict.fromkeys(lacking, "the track has no such stem")

    def sdr_cells(self, target: str) -> tuple[float, float, float, float]:
        """Return the SDR of the mixture, that of the model, the gain, the share of NaN frames."""
        if target not in self.scores:
            return 4 * (np.nan,)
        mixture = self.record["mixture_SDR"][target]["median"]
        model = aggregate(np.nanmedian, self.scores[target]["SDR"])
        return mixture, model, model - mixture, self.nan_share(target)

    def whole_track_cells(self, metric: str, target: str) -> tuple[float, float, float]:
        """Return uSDR or SI_SDR of the mixture, that of the model, the gain."""
        names = f"mixture_{metric}", metric
        mixture, model = (self.record[name].get(target, np.nan) for name in names)
        return mixture, model, model - mixture

    def nan_share(self, target: str) -> float:
        """Return the share of frames without a score."""
        return float(np.isnan(self.scores[target]["SDR"]).mean())


def read_scores(path: Path) -> Scores:
    """Read museval's scores of a track from a .json or .json.gz file.

    Returns:
        target -> metric -> dB of every frame, NaN where a frame has no score.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            targets = json.load(file)["targets"]
        names = [target["name"] for target in targets]
        scores = [
            {
                metric: np.array([frame["metrics"][metric] for frame in target["frames"]], float)
                for metric in METRICS
            }
            for target in targets
        ]
    except (OSError, EOFError, zlib.error, *DAMAGE):
        raise ValueError(f"{path}: damaged, or no scores of museval") from None
    for name in names:
        if not isinstance(name, str) or UNFIT_FOR_NAMES.search(name):
            raise ValueError(f"{path}: {ascii(name)} is no name of a target")
        if names.count(name) > 1:
            raise ValueError(f"{path}: has the target {name} twice")
    return dict(zip(names, scores, strict=True))


def read_record(scores: Path) -> dict:
    """Read the record beside TRACK.json: see `save_track`.

    Returns:
        {} where there is no record, as of another system, or it is damaged.
    """
    try:
        record = yaml.safe_load(_record_path(scores).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, *DAMAGE):
        return {}
    return record if isinstance(record, dict) else {}


def read_method(scores: Path) -> str | None:
    """Read from the record beside TRACK.json by which method the track was separated.

    Returns:
        one of choices.METHODS; None where no record says it.
    """
    try:
        return str(read_record(scores)["made_with"]["method"])
    except DAMAGE:
        return None


def save_track(out: Path, store, record: dict) -> None:
    """Write OUT/test/TRACK.json, as museval does, and its record, OUT/test/TRACK.yml.

    Args:
        store: a museval.TrackStore.
        record: a dict of
            - "made_with": the settings that the scores depend on, see `out.plan_records`
            - "files": the files of the track, see `tracks.describe_files`
            - "saved": the format of the saved estimates, or None
            - "version": of this recipe, on which the scores do not depend
            - "clipped": file -> samples beyond full scale, see `tracks.read_track`
            - "silent": target that has no scores -> whether its "reference" or its "estimate" is
                silent throughout
            - "without_reference": targets that are estimated, and that the track does not have
            - "frames": their number
            - "mixture_SDR": target -> {"median", "mean"} over frames of the mixture's SDR, in dB
            - "uSDR", "mixture_uSDR": target -> SDR of the whole track, in dB
            - "SI_SDR", "mixture_SI_SDR": the same of the scale-invariant SDR
    """
    store.validate()
    path = out / "test" / f"{store.track_name}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(store.json, encoding="utf-8")
    signed = {**record, "sha256": _hash(path, record)}
    with atomic_path(_record_path(path)) as temporary:
        temporary.write_text(yaml.safe_dump(signed, allow_unicode=True), encoding="utf-8")


def load_track(out: Path, name: str) -> ScoredTrack | None:
    """Read what `save_track` wrote. Return None where OUT has no scores of the track.

    Raises:
        ValueError: the scores or their record are damaged, or do not belong together.
    """
    path = out / "test" / f"{name}.json"
    if not path.is_file():
        return None
    try:
        scores = read_scores(path)
        record = yaml.safe_load(_record_path(path).read_text(encoding="utf-8"))
        is_intact = record.pop("sha256") == _hash(path, record)
    except FileNotFoundError:
        raise ValueError("no record of what made its scores") from None
    except (yaml.YAMLError, *DAMAGE):
        raise ValueError("its scores or their record are damaged") from None
    if not is_intact:
        raise ValueError("its scores and their record do not belong together")
    return ScoredTrack(name, scores, record)


def _hash(scores: Path, record: dict) -> str:
    """Return the SHA-256 of scores and record together: neither can change without the other."""
    text = json.dumps(record, sort_keys=True, default=str)
    return hashlib.sha256(scores.read_bytes() + text.encode()).hexdigest()


def remove_track(out: Path, name: str) -> None:
    """Remove the scores of a track, their record and the saved estimates, where they exist."""
    remove_scores(out, name)
    for file in _audio_paths(out, name, (*TARGETS, *SOURCES)):
        file.unlink(missing_ok=True)
        file.with_name(f".{file.name}.tmp").unlink(missing_ok=True)
    with suppress(OSError):  # there is no such folder, or it holds files of the user
        (out / name).rmdir()


def remove_scores(out: Path, name: str) -> None:
    """Remove the scores of a track and their record, where they exist."""
    path = out / "test" / f"{name}.json"
    for file in (path, _record_path(path)):
        file.unlink(missing_ok=True)


def _audio_paths(out: Path, name: str, targets: Iterable[str]) -> list[Path]:
    return [out / name / f"{target}.wav" for target in targets]


def _record_path(scores: Path) -> Path:
    return scores.with_name(f"{scores.name.removesuffix('.json')}.yml")


def find_change(out: Path, found: ScoredTrack, wanted: dict) -> str:
    """Return why a run would make other scores than those in OUT; "" where they would be the same.

    Args:
        wanted: "made_with", "files" and "saved" of the record that the run would write.
    """
    before, now = (DEFAULTS | record["made_with"] for record in (found.record, wanted))
    if change := find_changed_setting(before, now):
        return change
    if found.record["files"] != wanted["files"]:
        return "its files have changed"
    if "SI_SDR" not in found.record:
        return "scored by an earlier version, without SI-SDR"
    lengths = {len(found.scores.get(t, {}).get("SDR", ())) for t in found.record["SI_SDR"]}
    if lengths != {found.record["frames"]}:
        return "frames of it are missing"
    targets = wanted["made_with"].get("targets", DEFAULTS["targets"])
    audio = _audio_paths(out, found.name, targets)
    is_saved = found.record["saved"] == wanted["saved"] and all(file.is_file() for file in audio)
    return f"not saved as {wanted['saved']}" if wanted["saved"] and not is_saved else ""


def order_targets(targets: Iterable[str]) -> list[str]:
    """Return the targets without repetition: those of MUSDB18 first, in a fixed order."""
    found, known = set(targets), dict.fromkeys((*TARGETS, *SOURCES))
    return [target for target in known if target in found] + sorted(found - known.keys())


def make_track_store(name: str, scores: Scores):
    """Return the museval.TrackStore of frames of 1 s."""
    store = import_museval().TrackStore(name, win=1.0, hop=1.0)
    for target, values in scores.items():
        store.add_target(target, {metric: frames.tolist() for metric, frames in values.items()})
    return store


def aggregate(function: Callable, values: np.ndarray, axis: int | None = None):
    """Apply a NaN-aware mean or median. NaN, without numpy's warning, where all values are NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(values, axis=axis)


def summarise(frames: np.ndarray) -> dict[str, float]:
    """Return {"median", "mean"} of the dB of (frames,)."""
    return {name: float(aggregate(function, frames)) for name, function in AGGREGATES.items()}
