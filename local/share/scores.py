"""The scores of a run's best model: those of eval.py that were made with it, and no others."""

from pathlib import Path
from typing import NamedTuple

from local.eval.results import final_metrics
from local.eval.score_files import DAMAGE, ScoredTrack, load_track, read_record
from local.tools.command_line import UserError, plural, raise_together, suggest_path
from local.train.origin import is_musdb18


class Scores(NamedTuple):
    """The scores in a folder of eval.py.

    Args:
        folder: its name.
        tracks: sorted by name.
        made_with: the settings that all of them were made with.
    """

    folder: str
    tracks: list[ScoredTrack]
    made_with: dict

    @property
    def metrics(self) -> dict[str, float | None]:
        """TARGET_METRIC_median and so on: see `final_metrics`."""
        return final_metrics(self.tracks)

    @property
    def method(self) -> str:
        return str(self.made_with["method"])

    @property
    def dataset(self) -> str:
        """What the tracks are."""
        known = sum(is_musdb18(track.name) for track in self.tracks)
        others = len(self.tracks) - known
        if known and others:
            return f"{plural(known, 'track')} of MUSDB18 and {plural(others, 'other')}"
        return "MUSDB18" if known else "own tracks"


def find_scores(exp_dir: Path, name: Path | None, checkpoint: str) -> Scores | None:
    """Read the scores of a checkpoint.

    Args:
        name: the folder in `exp_dir`, or its path; None for the only one in `exp_dir` that was made
            with the checkpoint.
        checkpoint: its SHA-256.

    Returns:
        None where no folder is named, and there is none.

    Raises:
        UserError: there are several; or the one that is named holds other scores, or not all.
    """
    if name is not None:
        folder = exp_dir / name if (exp_dir / name).is_dir() else name
        return read_scores(folder, checkpoint)
    found = [
        folder
        for folder in sorted({path.parent.parent for path in exp_dir.glob("**/test/*.yml")})
        if checkpoint in set(map(_read_checkpoint, folder.glob("test/*.yml")))
    ]
    if len(found) > 1:
        names = ", ".join(str(folder.relative_to(exp_dir)) for folder in found)
        raise UserError(f"--eval is needed: {exp_dir} has scores of its best model in {names}")
    return read_scores(found[0], checkpoint) if found else None


def read_scores(folder: Path, checkpoint: str) -> Scores:
    """Read the scores in a folder of eval.py, all made with a checkpoint, and with equal settings.

    Raises:
        UserError: lists what it holds instead.
    """
    files = sorted(folder.glob("test/[!.]*.json"))
    if not files:
        raise UserError(f"--eval: {folder} holds no scores of eval.py{suggest_path(folder)}")
    tracks, faults = [], []
    for file in files:
        try:
            tracks.append(load_track(folder, file.name.removesuffix(".json")))
        except ValueError as error:
            faults.append(f"{file.name}: {error}; run eval.py again")
    raise_together(faults, heading=f"--eval: {folder}")
    settings = [track.record.get("made_with", {}) for track in tracks]
    others = [made_with for made_with in settings if made_with.get("checkpoint") != checkpoint]
    if others:
        raise UserError(
            f"--eval: {len(others)} of the {plural(len(tracks), 'track')} in {folder} were scored"
            f" with another checkpoint (SHA-256 {others[0].get('checkpoint', 'unknown')}) than"
            f" best_model.pth ({checkpoint}); run eval.py again, or name another folder"
        )
    if any(made_with != settings[0] for made_with in settings):
        raise UserError(f"--eval: {folder} holds scores of several settings; run eval.py again")
    if not (folder / "results.txt").is_file():
        raise UserError(f"--eval: {folder} has no results.txt, so eval.py has not ended; run it")
    return Scores(folder.name, tracks, settings[0])


def _read_checkpoint(record: Path) -> str | None:
    try:
        return read_record(record.with_suffix(".json"))["made_with"]["checkpoint"]
    except DAMAGE:
        return None
