"""What a run depends on besides its settings: code, versions, data, and the objects it has built.

Checkpoints keep it, so that a run that is resumed with another loss, optimizer or schedule says so.
"""

import hashlib
import inspect
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytorch_lightning as pl
import torch

ROOT = Path(__file__).parents[2]
VERSIONS = ("torch", "pytorch-lightning")
PLAIN = (bool, int, float, str, tuple, list)


@cache  # of the files as they were when the run started
def describe_code() -> dict[str, str]:
    """The SHA-256 of train.py and of every file of local/, and the versions of the libraries."""
    files = [ROOT / "train.py", *sorted((ROOT / "local").rglob("*.py"))]
    hashes = {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    return hashes | {name: version(name) for name in VERSIONS}


def find_code_changes(before: dict[str, str]) -> list[str]:
    """How the code differs from what `describe_code` gave before, a line each."""
    now = describe_code()
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    files = [name for name in changed if name not in VERSIONS]
    versions = [name for name in VERSIONS if name in changed]
    lines = [f"code: changed since in {', '.join(files)}"] if files else []
    return lines + [f"{name}: {before.get(name)} before, {now[name]} now" for name in versions]


def describe_inputs(trainer: pl.Trainer, train_set, valid_set) -> dict[str, list[str]]:
    """The devices and tracks of a run."""
    tracks = {"training tracks": train_set.tracks, "validation tracks": valid_set.tracks}
    return {
        "devices": [f"{trainer.world_size} x {trainer.strategy.root_device.type}"],
        **{
            name: [f"{track.name} ({track.length} samples)" for track in found]
            for name, found in tracks.items()
        },
    }


def describe_object(thing) -> str:
    """A loss, a schedule or a callback, with the arguments that are not its defaults."""
    if isinstance(thing, torch.nn.Module):
        return " ".join(repr(thing).split())
    if not hasattr(thing, "__dict__") or inspect.isfunction(thing):
        return getattr(thing, "__name__", repr(thing))
    return _format_call(type(thing).__name__, read_settings(thing, changed=True))


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """The same of an optimizer, with its present learning rate, and any weight decay: AdamW's
    default is not 0."""
    shown = {"lr": None} | read_settings(optimizer, changed=True)
    shown |= {name: optimizer.param_groups[0].get(name) for name in ("lr", "weight_decay")}
    if not shown["weight_decay"]:
        del shown["weight_decay"]
    return _format_call(type(optimizer).__name__, shown)


def read_settings(thing, changed: bool = False) -> dict:
    """The constructor's arguments that an object keeps as attributes, if they are plain values.

    Args:
        changed: only those that are not the defaults.
    """
    known = {**vars(thing), **vars(thing).get("defaults", {})}
    parameters = inspect.signature(type(thing)).parameters
    found = {
        name: known[name]
        for name in parameters
        if isinstance(known.get(name), PLAIN) and name != "last_epoch"  # which is a state
    }
    if not changed:
        return found
    return {name: value for name, value in found.items() if value != parameters[name].default}


def _format_call(name: str, settings: dict) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def list_schedules(system: pl.LightningModule) -> list:
    """The schedulers of a System, which takes one or several, in dictionaries or not."""
    given = system.scheduler or []
    given = given if isinstance(given, (list, tuple)) else [given]
    return [entry["scheduler"] if isinstance(entry, dict) else entry for entry in given]


def describe_objects(system: pl.LightningModule, trainer: pl.Trainer) -> dict[str, dict]:
    """Class and settings of optimizer, schedules, early stop and loss, as plain data."""
    built = {"optimizer": system.optimizer, "early stop": trainer.early_stopping_callback}
    built |= {f"schedule {i}": thing for i, thing in enumerate(list_schedules(system))}
    described = {
        name: {"kind": type(thing).__name__, "settings": read_settings(thing)}
        for name, thing in built.items()
        if thing is not None
    }
    return {**described, "loss": {"kind": describe_object(system.loss_func), "settings": {}}}


def keep_edits(checkpoint: dict, now: dict[str, dict]) -> None:
    """Removes from a checkpoint what would undo an edit: torch and Lightning restore not only the
    state of an optimizer, a schedule and an early stop, but also their settings.

    Args:
        checkpoint: whose entry "run" has the `describe_objects` of the run that saved it.
        now: those of the run that is resumed.
    """
    before = checkpoint["run"]["objects"]
    edits = {name: _find_edits(before.get(name), there) for name, there in now.items()}
    if edits["loss"] is None:  # values of another loss cannot be compared with those of this one
        edits = {name: edit if name == "optimizer" else None for name, edit in edits.items()}
        _drop_states(checkpoint, "BestCheckpoints")
    if edits["optimizer"] is None:
        checkpoint["optimizer_states"] = []
    for state in checkpoint["optimizer_states"]:
        for group in state["param_groups"]:
            group.update(edits["optimizer"])
    schedules = [edit for name, edit in edits.items() if name.startswith("schedule")]
    if None in schedules or len(schedules) != len(checkpoint["lr_schedulers"]):
        checkpoint["lr_schedulers"] = []
    for state, edit in zip(checkpoint["lr_schedulers"], schedules, strict=False):  # or none
        state.update(edit)
    if "early stop" in now:
        kind = now["early stop"]["kind"]
        if edits["early stop"] is None:
            _drop_states(checkpoint, kind)
        for state in _find_states(checkpoint, kind):
            state.update(edits["early stop"])


def _find_edits(before: dict | None, now: dict) -> dict | None:
    """The settings that have changed; None where the class has."""
    if before is None or before["kind"] != now["kind"]:
        return None
    known = before["settings"]
    return {name: value for name, value in now["settings"].items() if known.get(name) != value}


def _find_states(checkpoint: dict, kind: str) -> list[dict]:
    """The states of the callbacks of a class; Lightning's keys begin with its name."""
    return [state for key, state in checkpoint["callbacks"].items() if key.startswith(kind)]


def _drop_states(checkpoint: dict, kind: str) -> None:
    for key in [key for key in checkpoint["callbacks"] if key.startswith(kind)]:
        del checkpoint["callbacks"][key]
