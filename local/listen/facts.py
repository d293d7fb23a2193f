"""The facts of a run: how its tracks were separated, and its model trained."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from local.listen.runs import Run
from local.tools.command_line import plural
from local.tools.files import read_yaml

MADE_WITH = ("method", "segment", "overlap", "checkpoint", "precision", "scorer")
TRAINING = ("causal", "norm_type", "epochs", "segment", "loss")
LONGEST = 12  # characters: a SHA-256 is known by its beginning


def describe_run(run: Run) -> dict[str, str]:
    """Return the facts of a run: what they are of -> text; "" where that is not known."""
    facts = {"tracks": str(len(run.scores)), "with audio": str(len(run.estimates))}
    for fact in MADE_WITH:
        facts[fact] = _count(run.made_with(track, fact) for track in run.records)
    facts["recipe"] = _count(record.get("version") for record in run.records.values())
    return facts | _describe_training(run.find_conf())


def _count(values: Iterable) -> str:
    """Return the values as text, with their counts where there are several."""
    counts = Counter(str(value)[:LONGEST] for value in values if value is not None)
    if len(counts) < 2:
        return "".join(counts)
    return ", ".join(f"{value} ({plural(count, 'track')})" for value, count in counts.items())


def _describe_training(conf_file: Path | None) -> dict[str, str]:
    if conf_file is None or not conf_file.is_file():
        return {}
    conf = read_yaml(conf_file)
    sections = {
        key: value
        for part in conf.values()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    facts = {key: sections[key] for key in TRAINING if key in sections}
    names = {"segment": "segment of training"}
    return {names.get(key, key): str(value) for key, value in facts.items()}
