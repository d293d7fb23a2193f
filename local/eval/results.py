"""Scores on disk, and what is said of them: results.txt, results.csv, results.pandas."""

import csv
import gzip
import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from local.musdb18_tracks import TARGETS, UNFIT_FOR_NAMES
from local.tools.files import atomic_path

METRICS = ("SDR", "SIR", "ISR", "SAR")
RESULTS = ("results.txt", "results.csv", "results.pandas")
# What reading data of another kind than expected raises; huge numbers and deep nesting, too.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
AGGREGATES = {"median": np.nanmedian, "mean": np.nanmean}

Scores = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class ScoredTrack:
    """A track's scores, as `read_scores` gives them, and their record: see `save_track`."""

    name: str
    scores: Scores
    record: dict

    def sdr_cells(self, target: str) -> tuple[float, float, float, float]:
        """SDR of the mixture, SDR of the model, the gain, the share of NaN frames."""
        mixture = self.record["mixture_SDR"][target]["median"]
        model = aggregate(np.nanmedian, self.scores[target]["SDR"])
        return mixture, model, model - mixture, self.nan_share(target)

    def usdr_cells(self, target: str) -> tuple[float, float, float]:
        """uSDR of the mixture, uSDR of the model, the gain."""
        mixture, model = (self.record[name][target] for name in ("mixture_uSDR", "uSDR"))
        return mixture, model, model - mixture

    def nan_share(self, target: str) -> float:
        """The share of frames without a score."""
        return float(np.isnan(self.scores[target]["SDR"]).mean())


def read_scores(path: Path) -> Scores:
    """museval's scores of a track, from a .json or .json.gz file.

    Returns:
        target -> metric -> dB of every frame, NaN where it has no score.

    Raises:
        ValueError: it is damaged, or holds something else.
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
            raise ValueError(f"{path}: the target {name} is there twice")
    return dict(zip(names, scores, strict=True))


def save_track(out: Path, store, record: dict) -> None:
    """Writes OUT/test/TRACK.json, museval's, and TRACK.yml, the record of these very scores.

    Args:
        store: a museval.TrackStore.
        record: "made_with", whatever decides about the numbers; "files", those of the track as
            `references.describe_files` has them; the format in which its audio was "saved", or
            None; number of "frames"; "mixture_SDR", target -> {"median", "mean"} over frames of the
            untouched mixture's SDR; "uSDR" and "mixture_uSDR", target -> SDR of the whole track.
            All in dB.
    """
    store.validate()
    path = out / "test" / f"{store.track_name}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(store.json, encoding="utf-8")
    sealed = {**record, "sha256": _seal(path, record)}
    with atomic_path(_record_path(path)) as temporary:
        temporary.write_text(yaml.safe_dump(sealed, allow_unicode=True), encoding="utf-8")


def load_track(out: Path, name: str) -> ScoredTrack | None:
    """What `save_track` wrote; None where OUT has no scores of the track.

    Raises:
        ValueError: the scores are damaged, or not those that the record is of.
    """
    path = out / "test" / f"{name}.json"
    if not path.is_file():
        return None
    try:
        scores = read_scores(path)
        record = yaml.safe_load(_record_path(path).read_text(encoding="utf-8"))
        unchanged = record.pop("sha256") == _seal(path, record)
    except FileNotFoundError:
        raise ValueError("nothing says what made its scores") from None
    except (yaml.YAMLError, *DAMAGE):
        raise ValueError("its scores or their record are damaged") from None
    if not unchanged:
        raise ValueError("its scores are not those on record")
    return ScoredTrack(name, scores, record)


def _seal(scores: Path, record: dict) -> str:
    """The SHA-256 of scores and record together, so that neither can change without the other."""
    text = json.dumps(record, sort_keys=True, default=str)
    return hashlib.sha256(scores.read_bytes() + text.encode()).hexdigest()


def remove_track(out: Path, name: str) -> None:
    """Removes the scores of a track, their record and its audio, as far as they are there."""
    path = out / "test" / f"{name}.json"
    audio = _audio_paths(out, name)
    unfinished = [file.with_name(f".{file.name}.tmp") for file in audio]
    for file in (path, _record_path(path), *audio, *unfinished):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or holds files of others
        (out / name).rmdir()


def _audio_paths(out: Path, name: str) -> list[Path]:
    return [out / name / f"{target}.wav" for target in TARGETS]


def _record_path(scores: Path) -> Path:
    return scores.with_name(f"{scores.name.removesuffix('.json')}.yml")


def find_change(out: Path, found: ScoredTrack, wanted: dict) -> str:
    """Why scores in OUT are not those that a run would make; nothing where they are.

    Args:
        wanted: "made_with", "files" and "saved" of the record that the run would write.
    """
    made_with = found.record["made_with"]
    if made_with.get("checkpoint") != wanted["made_with"]["checkpoint"]:
        return "made with another checkpoint"
    now = wanted["made_with"].get("model_code")
    if made_with.get("model_code", now) != now:  # earlier versions kept none
        return "made with other code of the model"
    for key in {**wanted["made_with"], **made_with}:
        before, now = made_with.get(key), wanted["made_with"].get(key)
        if before != now and key != "model_code":
            return f"made with {key} {before}, not {now}"
    if found.record["files"] != wanted["files"]:
        return "its files have changed"
    if any(len(found.scores.get(t, {}).get("SDR", ())) != found.record["frames"] for t in TARGETS):
        return "frames of it are missing"
    audio = _audio_paths(out, found.name)
    is_saved = found.record["saved"] == wanted["saved"] and all(file.is_file() for file in audio)
    return f"not saved as {wanted['saved']}" if wanted["saved"] and not is_saved else ""


def describe_track(track: ScoredTrack) -> str:
    """A line: its SDR, the gain over the mixture, and the share of NaN frames."""
    shown = []
    for target in TARGETS:
        _, model, gain, nan_share = track.sdr_cells(target)
        shown.append(f"{target} {model:.2f} dB (gain {gain:+.2f}, NaN {nan_share:.0%})")
    return f"{track.name}: SDR {', '.join(shown)}"


def make_track_store(name: str, scores: Scores):
    """The museval.TrackStore of frames of 1 s."""
    import museval  # needs ffmpeg on the PATH, even to be imported

    store = museval.TrackStore(name, win=1.0, hop=1.0)
    for target, values in scores.items():
        store.add_target(target, {metric: frames.tolist() for metric, frames in values.items()})
    return store


def aggregate(function: Callable, values: np.ndarray, axis: int | None = None):
    """A nan-aware mean or median; NaN, without numpy's warning, where all values are NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(values, axis=axis)


def summarise(frames: np.ndarray) -> dict[str, float]:
    """(frames,) dB -> {"median", "mean"}."""
    return {name: float(aggregate(function, frames)) for name, function in AGGREGATES.items()}


def write_results(out: Path, scored: list[ScoredTrack], failures: dict[str, str]) -> str:
    """Writes RESULTS; returns the text of results.txt, which is written last.

    Args:
        failures: track -> why it has no scores.
    """
    import museval

    results = museval.EvalStore()
    for track in scored:
        results.add_track(make_track_store(track.name, track.scores))
    text = _describe(results, scored, failures)
    with atomic_path(out / "results.csv") as temporary:
        _write_csv(temporary, scored)
    with atomic_path(out / "results.pandas") as temporary:
        results.save(temporary)
    with atomic_path(out / "results.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _describe(results, scored: list[ScoredTrack], failures: dict[str, str]) -> str:
    lines = []
    if scored:
        lines += [*sdr_table(scored), "", *usdr_table(scored)]
    for frames_agg, tracks_agg in (("median", "median"), ("median", "mean"), ("mean", "median")):
        if scored:
            results.frames_agg, results.tracks_agg = frames_agg, tracks_agg
            lines += ["", *(line.rstrip() for line in str(results).strip().splitlines())]
    if scored:
        lines += ["", describe_nan_frames(scored)]
    if failures:
        lines += ["", f"Not scored: {len(failures)} of {len(scored) + len(failures)} tracks"]
        lines += [f"  {name}: {reason}" for name, reason in sorted(failures.items())]
    return "\n".join(lines) + "\n"


def describe_nan_frames(scored: list[ScoredTrack]) -> str:
    """A line: in how many frames a source is silent, so that museval gives no scores."""
    shown = []
    for target in TARGETS:
        missing = np.concatenate([np.isnan(track.scores[target]["SDR"]) for track in scored])
        shown.append(f"{target} {missing.sum()} of {missing.size} ({missing.mean():.1%})")
    return f"Frames without a score (NaN): {', '.join(shown)}"


def sdr_table(scored: list[ScoredTrack]) -> list[str]:
    """The lines of a table: SDR of the mixture and of the model, per track and over tracks."""
    rows = {track.name: [track.sdr_cells(target) for target in TARGETS] for track in scored}
    heading = f"{'mixture':>10}{'model':>8}{'gain':>8}{'NaN':>6}"
    return _table(
        "SDR in dB, median over 1 s frames", heading, "{:>10.2f}{:>8.2f}{:>+8.2f}{:>6.0%}", rows
    )


def usdr_table(scored: list[ScoredTrack]) -> list[str]:
    """Likewise of the whole-track SDR of the Music Demixing challenges."""
    rows = {track.name: [track.usdr_cells(target) for target in TARGETS] for track in scored}
    heading = f"{'mixture':>10}{'model':>8}{'gain':>8}"
    return _table(
        "uSDR in dB, whole track (MDX challenges)", heading, "{:>10.2f}{:>8.2f}{:>+8.2f}", rows
    )


def _table(title: str, heading: str, form: str, rows: dict[str, list[tuple]]) -> list[str]:
    """A line per track, a group of columns per target, median and mean over tracks below."""
    cells = np.array(list(rows.values()))  # (tracks, targets, cells)
    rows["median over tracks"] = aggregate(np.nanmedian, cells, axis=0)
    rows["mean over tracks"] = aggregate(np.nanmean, cells, axis=0)
    width = max(len(title), *map(len, rows))
    lines = [
        f"{title:{width}}" + "".join(f"{target:>{len(heading)}}" for target in TARGETS),
        f"{'track':{width}}" + len(TARGETS) * heading,
    ]
    for name, targets in rows.items():
        lines.append(f"{name:{width}}" + "".join(form.format(*numbers) for numbers in targets))
    return lines


def _write_csv(path: Path, scored: list[ScoredTrack]) -> None:
    columns = [f"{metric}_{name}" for name in AGGREGATES for metric in METRICS]
    columns += [f"mixture_SDR_{name}" for name in AGGREGATES] + ["uSDR", "mixture_uSDR"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["track", "target", *columns, "frames", "nan_share"])
        for track in scored:
            for target in TARGETS:
                frames = track.scores[target]
                summaries = {metric: summarise(frames[metric]) for metric in METRICS}
                values = [summaries[metric][name] for name in AGGREGATES for metric in METRICS]
                values += [track.record["mixture_SDR"][target][name] for name in AGGREGATES]
                values += [track.record[name][target] for name in ("uSDR", "mixture_uSDR")]
                values.append(track.nan_share(target))
                shown = [f"{value:.5f}" for value in values]
                writer.writerow([track.name, target, *shown[:-1], len(frames["SDR"]), shown[-1]])
