"""Going on where a run ended: its last checkpoints, the settings it had, logs that go on with it.

A run that goes on computes what an undisturbed one would, to the last bit. With Lightning alone it
would not: that starts the items of an epoch anew in its middle, and forgets what it had summed up.
So a checkpoint is taken before a batch, when nothing of the one before is pending, and the system
and the sampler keep what Lightning does not.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import yaml
from pytorch_lightning.utilities import rank_zero_only

from local.config import FREE, add_defaults
from local.models import model_args, model_name
from local.tools.command_line import UserError, brief
from local.tools.files import atomic_path
from local.tools.weights import load_weights_only
from local.train.checkpoints import list_last
from local.train.recipe import describe_surroundings, find_code_changes


def load_last(folder: Path, set_aside: bool) -> tuple[Path | None, dict | None]:
    """The newest checkpoint that can be read, as from `load_point`; nothing where there is none.

    Args:
        set_aside: whether those that cannot be read are renamed; they are named in any case.
    """
    for path in list_last(folder):
        try:
            return path, load_point(path)
        except UserError as error:
            aside = path.with_suffix(".damaged")
            if rank_zero_only.rank == 0:
                renamed = f"; renamed to {aside.name}" if set_aside else ""
                print(f"warning: {error}{renamed}", file=sys.stderr)
            if set_aside:
                path.rename(aside)
    return None, None


def load_point(path: Path) -> dict:
    """What a checkpoint of `LastCheckpoints` says of its run: all but the model and its optimizer.

    Raises:
        UserError: it is damaged, or another kind.
    """
    try:
        checkpoint = load_weights_only(path)
        if not isinstance(checkpoint, dict) or "metrics" not in checkpoint.get("so_far", ()):
            raise ValueError("it is no last-*.ckpt")
    except Exception as error:
        raise UserError(f"{path}: no checkpoint to go on from: {brief(error)}") from None
    kept = ("epoch", "global_step", "training_config", "so_far", "finished")
    return {name: checkpoint[name] for name in kept if name in checkpoint}


def find_changes(conf: dict, surroundings: dict[str, list[str]], point: dict) -> list[str]:
    """By what a run would not be the one that a checkpoint is from, a line each."""
    saved = point["training_config"]
    # What a run of an earlier version had no key for, it did as the default has it.
    before = {**dict.fromkeys(conf, {}), **add_defaults(saved)}
    changes = [
        f"--{key}: {before[section].get(key)} before, {value} now"
        for section, keys in conf.items()
        for key, value in keys.items()
        if key not in FREE and before[section].get(key) != value
    ]
    for name, now in surroundings.items():
        then = point["so_far"]["surroundings"][name]
        if then != now:
            gone = [item for item in then if item not in now]
            new = [item for item in now if item not in then]
            changes.append(f"{name}: {_first(*gone)} before, {_first(*new)} now")
    return changes


def _first(*names: str, most: int = 3) -> str:
    shown = ", ".join(names[:most]) or "no other"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def check_point(
    conf: dict, point: dict, trainer: pl.Trainer, train_set, valid_set, accept_changes: bool
) -> list[str]:
    """What has changed since a checkpoint, a line each, where the run can go on from it.

    Raises:
        UserError: it cannot. Something has changed that was not accepted, or the model has, or
            there is no such place in the run any more.
    """
    exp_dir, epochs = conf["main_args"]["exp_dir"], conf["training"]["epochs"]
    changes = find_changes(conf, describe_surroundings(trainer, train_set, valid_set), point)
    code_changes = find_code_changes(point["so_far"].get("code", {}))
    if is_finished(point, conf) and not changes:
        return code_changes
    odd = "settings" if changes else "code"
    changes += code_changes
    is_same_model = describe_network(point["training_config"]) == describe_network(conf)
    if changes and not (accept_changes and is_same_model):
        advice = "name another --exp_dir"
        if is_same_model:
            advice += ", or go on with --resume_with_changes"
        heading = f"{exp_dir}: the run had other {odd}; {advice}:"
        raise UserError("\n  ".join([heading, *changes]))
    if is_finished(point, conf):
        return changes
    if "objects" not in point["so_far"]:
        raise UserError(
            f"{exp_dir}: its last-*.ckpt are of an earlier version of this recipe, and a run cannot"
            " go on from them; name another --exp_dir"
        )
    place = f"{exp_dir}: the run goes on in epoch {point['epoch']}"
    if point["epoch"] >= epochs:
        raise UserError(f"{place}, and --epochs {epochs} has none such")
    seen = point["so_far"]["items"]
    if seen >= len(train_set):
        raise UserError(
            f"{place} after {seen} items, and with these settings it has {len(train_set)};"
            " name another --exp_dir"
        )
    return changes


def describe_network(conf: dict) -> tuple[str, dict]:
    return model_name(conf), model_args(conf)


def is_finished(point: dict, conf: dict) -> bool:
    """Whether a run has nothing left to do."""
    end, training = point.get("finished"), conf["training"]
    return bool(end) and (
        (end["early"] and training["early_stop"])
        or training["epochs"] <= end["epochs"]
        or 0 < training["max_steps"] <= point["global_step"]
    )


def record_changes(exp_dir: Path, changes: list[str], point: dict) -> None:
    """Adds to EXP/changes.yml what was changed, and from which epoch and step on."""
    path = exp_dir / "changes.yml"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    place = {"epoch": point["epoch"], "step": point["global_step"]}
    added = yaml.safe_dump([{**place, "changes": changes}], allow_unicode=True, sort_keys=False)
    if not before.endswith(added):  # by a run that was killed before it had a checkpoint of its own
        with atomic_path(path) as temporary:
            temporary.write_text(before + added, encoding="utf-8")
