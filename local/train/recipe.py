"""What a run is made of beside its settings: the code, the versions, the objects that it built.

A checkpoint keeps this, so that a run that is resumed with another loss, optimizer or schedule says
so.
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


@cache  # what runs is what was there when the run started
def describe_code() -> dict[str, str]:
    """The SHA-256 of each file that training could run, and the versions of what it runs on."""
    files = [ROOT / "train.py", *sorted((ROOT / "local").rglob("*.py"))]
    hashes = {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    return hashes | {name: version(name) for name in VERSIONS}


def find_code_changes(before: dict[str, str]) -> list[str]:
    """In what the code is another one than `describe_code` gave before, a line each."""
    if not before:
        return ["code: of a version of this recipe that kept no record of it"]
    now = describe_code()
    odd = [name for name in before | now if before.get(name) != now.get(name)]
    files = [name for name in odd if name not in VERSIONS]
    lines = [f"code: changed since in {', '.join(files)}"] if files else []
    return lines + [
        f"{name}: {before.get(name)} before, {now[name]} now" for name in VERSIONS if name in odd
    ]


def describe_surroundings(trainer: pl.Trainer, train_set, valid_set) -> dict[str, list[str]]:
    """What a run depends on beside its settings."""
    tracks = {"training tracks": train_set.tracks, "validation tracks": valid_set.tracks}
    return {
        "devices": [f"{trainer.world_size} x {trainer.strategy.root_device.type}"],
        **{
            name: [f"{track.name} ({track.length} samples)" for track in found]
            for name, found in tracks.items()
        },
    }


def describe_object(thing) -> str:
    """A loss, a schedule or a callback, and what it was made with that is not its default."""
    if isinstance(thing, torch.nn.Module):
        return " ".join(repr(thing).split())
    if not hasattr(thing, "__dict__") or inspect.isfunction(thing):
        return getattr(thing, "__name__", repr(thing))
    return _call(type(thing).__name__, read_settings(thing, changed=True))


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    shown = {"lr": None} | read_settings(optimizer, changed=True)
    shown["lr"] = optimizer.param_groups[0]["lr"]
    return _call(type(optimizer).__name__, shown)


def read_settings(thing, changed: bool = False) -> dict:
    """The arguments of its constructor that an object still knows, if they are plain values.

    Args:
        changed: those alone that are not the defaults.
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


def _call(name: str, settings: dict) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def list_schedules(system: pl.LightningModule) -> list:
    """The schedulers of a System, which takes one or several, as they are or in dictionaries."""
    given = system.scheduler or []
    given = given if isinstance(given, (list, tuple)) else [given]
    return [entry["scheduler"] if isinstance(entry, dict) else entry for entry in given]


def describe_objects(system: pl.LightningModule, trainer: pl.Trainer) -> dict[str, dict]:
    """What was built of each kind, and with what: plain data, for a checkpoint."""
    things = {"optimizer": system.optimizer, "early stop": trainer.early_stopping_callback}
    things |= {f"schedule {i}": thing for i, thing in enumerate(list_schedules(system))}
    described = {
        name: {"kind": type(thing).__name__, "settings": read_settings(thing)}
        for name, thing in things.items()
        if thing is not None
    }
    return {**described, "loss": {"kind": describe_object(system.loss_func), "settings": {}}}


def keep_edits(checkpoint: dict, now: dict[str, dict]) -> None:
    """Takes out of a checkpoint what would undo an edit: torch and Lightning restore what an
    optimizer, a schedule and an early stop were made with, not only how far they had come.

    Args:
        checkpoint: of a run that had its own `describe_objects` in `so_far`.
        now: of the run that is resumed.
    """
    before = checkpoint["so_far"]["objects"]
    edits = {name: _find_edits(before.get(name), there) for name, there in now.items()}
    if edits["loss"] is None:  # what was best by the old one says nothing of the new
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
    """The settings that an object has now and had not before; None where it is of another kind."""
    if before is None or before["kind"] != now["kind"]:
        return None
    known = before["settings"]
    return {name: value for name, value in now["settings"].items() if known.get(name) != value}


def _find_states(checkpoint: dict, kind: str) -> list[dict]:
    """Those of the callbacks of a class; Lightning's keys begin with its name."""
    return [state for key, state in checkpoint["callbacks"].items() if key.startswith(kind)]


def _drop_states(checkpoint: dict, kind: str) -> None:
    for key in [key for key in checkpoint["callbacks"] if key.startswith(kind)]:
        del checkpoint["callbacks"][key]
