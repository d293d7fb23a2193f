"""EXP, the folder of a run: what is in it, room for it, and who holds it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from local.tools.command_line import UserError
from local.tools.files import atomic_path, locked, make_absolute

MORE_CHECKPOINTS = 3  # than the best: the last two, and one that is being written
WEIGHT_BYTES = 4  # of a parameter
EXAMPLE_BYTES = 4.4e6  # of a track in a round, with two targets at 44.1 kHz
LOG_BYTES = 50e6
WRITTEN = {
    **dict.fromkeys(("checkpoints", "logs", "tensorboard"), "folder"),
    **dict.fromkeys(("conf.yml", "best_model.pth", "best_k_models.json"), "file"),
    **dict.fromkeys(("changes.yml", "train.log", "curves.png"), "file"),
}


def is_used(exp_dir: Path) -> bool:
    """Whether a run has made an optimizer step there."""
    checkpoints = exp_dir.glob("checkpoints/*.ckpt")
    has_learned = any(not path.name.endswith("-step=0.ckpt") for path in checkpoints)
    return (exp_dir / "best_model.pth").exists() or has_learned


def find_folder_faults(exp_dir: Path, training: dict, parameters: int) -> list[str]:
    """Why a run could not write to EXP, a line each; leaves nothing there.

    Args:
        training: the section of the configuration.
        parameters: of the model.
    """
    place = find_existing_parent(exp_dir)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return [f"--exp_dir: {exp_dir} cannot be written: {place}: {error.strerror}"]
    in_the_way = [
        f"--exp_dir: {exp_dir / name} is in the way: it should be a {kind}"
        for name, kind in WRITTEN.items()
        if os.path.lexists(exp_dir / name) and (exp_dir / name).is_dir() != (kind == "folder")
    ]
    if in_the_way:
        return in_the_way
    needed = count_needed_bytes(exp_dir, training, parameters)
    free = shutil.disk_usage(place).free
    if free < needed:
        return [
            f"--exp_dir: a run writes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            f" in {place}; make room, or name another folder"
        ]
    return []


def count_needed_bytes(exp_dir: Path, training: dict, parameters: int) -> float:
    """What the checkpoints, examples and logs of a run take, less those two that are there.

    A checkpoint holds the weights, Adam's two averages, and with --ema that of the weights;
    best_model.pth, which is written anew beside the old one, holds the weights. Examples are
    written after every epoch where epochs are long, and less often where they are short.
    """
    there = [*exp_dir.glob("checkpoints/*.ckpt"), *exp_dir.glob("tensorboard/examples/*")]
    written = sum(path.stat().st_size for path in there)
    checkpoints = training["keep_best"] + MORE_CHECKPOINTS
    copies = checkpoints * (4 if training["ema"] else 3) + 2
    whole = parameters * WEIGHT_BYTES * copies
    examples = EXAMPLE_BYTES * training["examples"] * max(training["epochs"], 0)
    return max(whole + examples - written, 0) + LOG_BYTES


def find_existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def describe_disk(exp_dir: Path, training: dict, parameters: int) -> str:
    free = shutil.disk_usage(find_existing_parent(exp_dir)).free
    needed = count_needed_bytes(exp_dir, training, parameters)
    return f"about {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB free"


@contextmanager
def reserved(exp_dir: Path, writes: bool) -> Iterator[None]:
    """Makes EXP and holds it for this process; removes it if it stays empty.

    Args:
        writes: whether this process does; else nothing is done.

    Raises:
        UserError: it cannot be written, or another process holds it.
    """
    if not writes:
        yield
        return
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--exp_dir: {exp_dir} cannot be written: {error.strerror}") from None
    with locked(exp_dir):
        try:
            yield
        finally:
            if [path.name for path in exp_dir.iterdir()] == [".lock"]:
                shutil.rmtree(exp_dir)


def write_settings(conf: dict, resumed=None) -> None:
    """Writes EXP/conf.yml, and adds the changes of a resumed run to EXP/changes.yml.

    Args:
        resumed: as of `resume.find_resumed`.

    Raises:
        UserError: they cannot be written.
    """
    exp_dir = Path(conf["main_args"]["exp_dir"])
    try:
        if resumed and resumed.changes:
            _record_changes(exp_dir, resumed)
        for key in ("root", "valid_tracks"):  # relative ones hold in this folder alone
            if isinstance(value := conf["data"][key], list):
                conf["data"][key] = [make_absolute(each) for each in value]
            elif value:
                conf["data"][key] = make_absolute(value)
        saved = {**conf, "main_args": {**conf["main_args"], "exp_dir": make_absolute(exp_dir)}}
        with atomic_path(exp_dir / "conf.yml") as temporary:
            text = yaml.safe_dump(saved, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--exp_dir: {exp_dir} cannot be written: {error.strerror}") from None


def _record_changes(exp_dir: Path, resumed) -> None:
    path = exp_dir / "changes.yml"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    entry = {"epoch": resumed.content["epoch"], "step": resumed.step, "changes": resumed.changes}
    added = yaml.safe_dump([entry], allow_unicode=True, sort_keys=False)
    if not before.endswith(added):  # else a run that was killed before its next checkpoint did it
        with atomic_path(path) as temporary:
            temporary.write_text(before + added, encoding="utf-8")
