"""Resuming a run: which checkpoint, what has changed since, whether there is anything to do."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

from local.config import add_defaults
from local.keys import FREE
from local.models import model_args, model_name
from local.tools.command_line import UserError, brief, plural
from local.tools.progress import keep
from local.tools.weights import load_weights_only
from local.train.checkpoints import list_last, remove_old
from local.train.loaders import count_batches
from local.train.recipe import describe_inputs, find_code_changes
from local.train.run_folder import is_used

KEPT = ("epoch", "global_step", "training_config", "run")


class EarlierVersion(UserError):
    """A checkpoint of an earlier version of this recipe, which this one cannot resume."""


@dataclass
class Resumed:
    """A run that is resumed.

    Args:
        path: of its checkpoint.
        content: of the checkpoint, as of `load_last_checkpoint`.
        changes: in what the run differs since, a line each.
    """

    path: Path
    content: dict
    changes: list[str]

    @property
    def step(self) -> int:
        return self.content["global_step"]

    @property
    def metrics(self) -> str:
        return self.content["run"]["metrics"]

    def describe(self, conf: dict, trainer: pl.Trainer) -> str:
        """The line of the first screen."""
        batch = count_batches(conf, self.content["run"]["items"], trainer.world_size)
        epoch = self.content["epoch"]
        return f"{'resumes':<11}in epoch {epoch}, batch {batch}, from {self.path}"

    def describe_end(self, conf: dict) -> str:
        """Why there is nothing left to do, and what has changed since; empty if there is."""
        if not is_finished(self.content, conf):
            return ""
        end = self.content["run"]["finished"]
        max_steps = self.content["training_config"]["training"]["max_steps"]
        why = "more --epochs extend it"
        if end["early"]:
            why = "it stopped early"
        elif 0 < max_steps <= self.step:
            why = f"it had --max_steps {max_steps}"
        exp_dir = self.path.parent.parent
        line = f"{exp_dir} is finished, after {plural(end['epochs'], 'epoch')}; {why}"
        return "\n  ".join([f"{line}; since then:" if self.changes else line, *self.changes])


def find_saved_conf(conf: dict, options: dict) -> dict | None:
    """The configuration of the run that `find_resumed` will find; None for a new run, or if none
    of its checkpoints can be read.
    """
    exp_dir, resume = Path(conf["main_args"]["exp_dir"]), options["resume"]
    paths = [Path(resume)] if resume not in ("auto", "never") else []
    if resume == "auto" and is_used(exp_dir):
        paths = list_last(exp_dir / "checkpoints")
    for path in paths:
        with suppress(UserError):  # `find_resumed` reports it
            return load_last_checkpoint(path)["training_config"]
    return None


def find_resumed(
    conf: dict, options: dict, trainer: pl.Trainer, train_set, valid_set
) -> Resumed | None:
    """The run that the flags ask to resume; None for a new one.

    Raises:
        UserError: there is no such run, or it cannot be resumed: its checkpoints are damaged, or
            something has changed that --resume_with_changes does not accept.
    """
    exp_dir = Path(conf["main_args"]["exp_dir"])
    path, content = _find_checkpoint(exp_dir, options)
    if content is None:
        return None
    inputs = describe_inputs(trainer, train_set, valid_set)
    changes = find_changes(conf, inputs, content)
    code_changes = find_code_changes(content["run"]["code"])
    if changes or not is_finished(content, conf):
        _refuse_changes(conf, content, changes, code_changes, options["resume_with_changes"])
    if not is_finished(content, conf):
        _refuse_lost_place(conf, content, len(train_set))
    return Resumed(path, content, changes + code_changes)


def _find_checkpoint(exp_dir: Path, options: dict) -> tuple[Path | None, dict | None]:
    resume, folder = options["resume"], exp_dir / "checkpoints"
    if resume == "never":
        return None, None
    if resume == "auto":
        rename = rank_zero_only.rank == 0 and not options["check"]
        path, content = load_newest(folder, rename)
        if is_used(exp_dir) and not content:
            raise UserError(
                f"--exp_dir: {exp_dir} holds a run, and no last-*.ckpt to resume it from; name"
                " another --exp_dir, or delete it"
            )
        # A run that has learned nothing may start again, with other settings as well.
        return (path, content) if is_used(exp_dir) else (None, None)
    path = Path(resume)
    if is_used(exp_dir) and path.parent.resolve() != folder.resolve():
        raise UserError(f"--resume {path}: {exp_dir} holds another run; name another --exp_dir")
    try:
        return path, load_last_checkpoint(path)
    except UserError as error:
        raise UserError(f"--resume {error}") from None


def load_newest(folder: Path, rename: bool) -> tuple[Path | None, dict | None]:
    """The newest last-*.ckpt that can be read, and what `load_last_checkpoint` gives of it.

    Args:
        rename: those that cannot be read, to .damaged (a warning names them in any case), and
            remove those that are no longer needed.
    """
    for path in list_last(folder):
        try:
            content = load_last_checkpoint(path)
            if rename:
                remove_old(folder)  # which a run that was killed at its end has left
            return path, content
        except EarlierVersion:
            raise
        except UserError as error:
            damaged = path.with_suffix(".damaged")
            if rank_zero_only.rank == 0:
                renamed = f"; renamed to {damaged.name}" if rename else ""
                warning = f"warning: {error}{renamed}"
                print(warning, file=sys.stderr)
                keep(warning)
            if rename:
                path.rename(damaged)
    return None, None


def load_last_checkpoint(path: Path) -> dict:
    """What a last-*.ckpt says of its run, without the model and the optimizer.

    Settings that are newer than the checkpoint have their defaults.

    Raises:
        UserError: it is damaged, another kind, or of an earlier version.
    """
    try:
        checkpoint = load_weights_only(path)
        if not isinstance(checkpoint, dict) or not {"run", "so_far"} & checkpoint.keys():
            raise ValueError("it is no last-*.ckpt")
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint to resume from: {brief(error)}") from None
    if "run" not in checkpoint:
        raise EarlierVersion(
            f"{path}: an earlier version of this recipe wrote it, and this one cannot resume it;"
            " name another --exp_dir"
        )
    kept = {name: checkpoint[name] for name in KEPT}
    return {**kept, "training_config": add_defaults(kept["training_config"])}


def find_changes(conf: dict, inputs: dict[str, list[str]], content: dict) -> list[str]:
    """The settings, tracks and devices that differ from those of a checkpoint, a line each.

    Args:
        inputs: as of `describe_inputs`.
        content: as of `load_last_checkpoint`.
    """
    before = {**dict.fromkeys(conf, {}), **content["training_config"]}
    changes = [
        f"--{key}: {_show(before[section].get(key))} before, {_show(value)} now"
        for section, keys in conf.items()
        for key, value in keys.items()
        if key not in FREE and before[section].get(key) != value
    ]
    for name, now in inputs.items():
        then = content["run"]["inputs"][name]
        if then != now:
            gone = [item for item in then if item not in now]
            new = [item for item in now if item not in then]
            changes.append(f"{name}: {_list_first(*gone)} before, {_list_first(*new)} now")
    return changes


def _show(value) -> str:
    return str(value) if value != "" else "none"


def _list_first(*names: str, most: int = 3) -> str:
    shown = ", ".join(names[:most]) or "no other"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _refuse_changes(
    conf: dict, content: dict, changes: list[str], code_changes: list[str], accept: bool
) -> None:
    before, now = content["training_config"], conf
    is_same_model = (model_name(before), model_args(before)) == (model_name(now), model_args(now))
    if not (changes or code_changes) or (accept and is_same_model):
        return
    changed = " and ".join(["settings"] * bool(changes) + ["code"] * bool(code_changes))
    advice = "name another --exp_dir"
    if is_same_model:
        advice += ", or resume with --resume_with_changes"
    heading = f"{conf['main_args']['exp_dir']}: the run had other {changed}; {advice}:"
    raise UserError("\n  ".join([heading, *changes, *code_changes]))


def _refuse_lost_place(conf: dict, content: dict, items: int) -> None:
    """Raises a UserError if the place of a checkpoint is beyond the end of the run or the epoch."""
    exp_dir, epochs = conf["main_args"]["exp_dir"], conf["training"]["epochs"]
    place = f"{exp_dir}: the run resumes in epoch {content['epoch']}"
    if 0 < epochs <= content["epoch"]:
        raise UserError(f"{place}, and ends before that with --epochs {epochs}; raise --epochs")
    if content["run"]["items"] >= items:
        raise UserError(
            f"{place} after {content['run']['items']} items, and with these settings an epoch has"
            f" {items}; name another --exp_dir"
        )


def is_finished(content: dict, conf: dict) -> bool:
    """Whether a run has nothing left to do."""
    end, training = content["run"].get("finished"), conf["training"]
    return bool(end) and (
        (end["early"] and training["early_stop"])
        or 0 < training["epochs"] <= end["epochs"]
        or 0 < training["max_steps"] <= content["global_step"]
    )
