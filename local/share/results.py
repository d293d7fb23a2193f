"""The scores of a model, as a section of its card."""

import numpy as np

from local.comparison.runs import PUBLISHED_CARDS, PUBLISHED_METHODS
from local.eval.results import list_targets, track_metrics
from local.eval.score_files import METRICS
from local.share.facts import Facts
from local.share.scores import Scores
from local.share.sources import has_other_code
from local.tools.command_line import plural
from local.tools.markdown import escape, table

NONE = "No scores of this model were published with it."
CARD = PUBLISHED_CARDS["published non-causal"]
CARDS = f"the scores on the cards of [{CARD}](https://huggingface.co/{CARD}) and its causal sibling"


def describe_scores(facts: Facts, scores: Scores | None) -> str:
    """Return the section of the card: how the scores were made, medians, and a table per target."""
    if scores is None:
        return NONE
    targets = list_targets(scores.tracks)
    parts = [
        "BSSEval v4 (museval's numbers) in dB, in frames of 1 s. A track counts with the median"
        " over its frames; frames in which a source is silent have no score (NaN). *Mixture SDR* is"
        " that of the untouched mixture as the estimate.",
        f"Test tracks: {scores.dataset}. {_describe_method(scores)}",
        *_find_warnings(facts, scores),
        "**Medians over tracks**",
        table([["target", *_heading(), "tracks"], *(_summary(scores, t) for t in targets)]),
    ]
    for target in targets:
        parts += [f"**Every track: {target}**", _track_table(scores, target)]
    return "\n\n".join(parts)


def _describe_method(scores: Scores) -> str:
    made_with = scores.made_with
    precision = made_with.get("precision", "float32")
    note = f" Its products were in {precision}." if precision != "float32" else ""
    if scores.method in PUBLISHED_METHODS:
        return (
            f"Whole tracks went through the model at once (`eval.py --method {scores.method}`), as"
            f" for {CARDS}: the numbers of tracks that both have compare.{note}"
        )
    return (
        f"Tracks were separated in windows (`eval.py --method {scores.method} --segment"
        f" {made_with['segment']} --overlap {made_with['overlap']}`), as the baseline of the Second"
        f" Cadenza Challenge does. The scores do not compare with {CARDS}, which are of"
        f" whole tracks at once.{note}"
    )


def _find_warnings(facts: Facts, scores: Scores) -> list[str]:
    """Return what makes the scores better or other than those of a user, a paragraph each."""
    found = []
    if seen := count_seen(facts, scores):
        of_all = f"{seen} of these {plural(len(scores.tracks), 'track')}"
        found.append(f"**The model was trained or validated on {of_all}.**")
    if has_other_code(facts.model, scores.made_with.get("model_code")):
        found.append("The model's code in `local/` is not that with which the scores were made.")
    return found


def count_seen(facts: Facts, scores: Scores) -> int:
    """Return how many of the scored tracks the model was trained or validated on."""
    kinds = ("training_tracks", "validation_tracks")
    seen = {name for kind in kinds for name in facts.infos.get(kind, ())}
    return len(seen & {track.name for track in scores.tracks})


def _heading() -> list[str]:
    return ["SDR", "mixture SDR", *METRICS[1:], "NaN frames"]


def _summary(scores: Scores, target: str) -> list[str]:
    tracks = [track for track in scores.tracks if target in track.scores]
    medians = scores.metrics
    metrics = [medians[f"{target}_{metric}_median"] for metric in METRICS]
    metrics.insert(1, medians[f"{target}_mixture_SDR_median"])
    frames = np.concatenate([track.scores[target]["SDR"] for track in tracks])
    missing = f"{np.isnan(frames).sum()} of {frames.size}"
    return [target, *map(_cell, metrics), missing, str(len(tracks))]


def _track_table(scores: Scores, target: str) -> str:
    rows = [["track", *_heading()]]
    for track in scores.tracks:
        name = escape(track.name)
        if target not in track.scores:
            rows.append([f"{name}: none, {track.unscored.get(target, 'unknown')}", *[""] * 6])
            continue
        metrics = track_metrics(track, target)
        shown = [_cell(metrics[key]) for key in ("SDR", "mixture_SDR", *METRICS[1:])]
        frames = track.scores[target]["SDR"]
        rows.append([name, *shown, f"{np.isnan(frames).sum()} of {frames.size}"])
    return table(rows)


def _cell(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.2f}"


def summarise_scores(scores: Scores | None) -> str:
    """Return a line for the command."""
    if scores is None:
        return "none: no folder in EXP holds scores of best_model.pth; eval.py makes them"
    tracks = plural(len(scores.tracks), "track")
    return f"{scores.folder}, {tracks}, method {scores.method}"
