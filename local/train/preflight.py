"""What a run needs besides a valid configuration, looked at before it starts."""

import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from local.musdb18_tracks import SOURCES, DatasetError, Track, raise_dataset_faults

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
SHOWN = ("torch", "pytorch-lightning", "asteroid", "numpy", "soundfile")
SAMPLE = 0.1  # seconds at the end of every file
READERS = 8  # files at a time; a network drive is asked for many
CHECKPOINTS = 13  # the ten best, the last two, and one that is being written
WEIGHT_BYTES = 4  # of the weights of best_model.pth; a checkpoint holds Adam's two averages as well
LOG_BYTES = 50e6
WRITTEN = {  # below EXP
    **dict.fromkeys(("checkpoints", "logs", "tensorboard"), "folder"),
    **dict.fromkeys(("conf.yml", "best_model.pth", "best_k_models.json", "changes.yml"), "file"),
}


def check_ends(root: Path, tracks: Sequence[Track]) -> None:
    """Reads every stem at its end; a header alone promises more than may be there.

    Raises:
        DatasetError: lists those that cannot be read.
    """
    files = [(track, source) for track in tracks for source in SOURCES]
    with ThreadPoolExecutor(READERS) as pool:
        raise_dataset_faults(root, [fault for fault in pool.map(_find_fault, files) if fault])


def _find_fault(file: tuple[Track, str]) -> str:
    track, source = file
    length = min(round(SAMPLE * track.rate), track.length)
    try:
        track.read(source, track.length - length, length)
    except DatasetError as error:
        return str(error)
    return ""


def find_place_faults(exp_dir: Path, parameters: int) -> list[str]:
    """Why what a run writes would not find its place, a line each; nothing is left there.

    Args:
        parameters: of the model.
    """
    place = existing_parent(exp_dir)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return [f"--exp_dir: {exp_dir} cannot be written: {place}: {error.strerror}"]
    odd = [
        f"--exp_dir: {exp_dir / name} is in the way: it should be a {kind}"
        for name, kind in WRITTEN.items()
        if os.path.lexists(exp_dir / name) and (exp_dir / name).is_dir() != (kind == "folder")
    ]
    if odd:
        return odd
    needed, free = needed_bytes(exp_dir, parameters), shutil.disk_usage(place).free
    if free < needed:
        return [
            f"--exp_dir: a run writes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            f" in {place}; make room, or name another folder"
        ]
    return []


def needed_bytes(exp_dir: Path, parameters: int) -> float:
    """What the checkpoints and logs of a run will take, beside what it wrote before it goes on."""
    written = sum(path.stat().st_size for path in exp_dir.glob("checkpoints/*.ckpt"))
    whole = parameters * WEIGHT_BYTES * (3 * CHECKPOINTS + 2)
    return max(whole - written, 0) + LOG_BYTES


def existing_parent(folder: Path) -> Path:
    """A folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def describe_disk(exp_dir: Path, parameters: int) -> str:
    free = shutil.disk_usage(existing_parent(exp_dir)).free
    needed = needed_bytes(exp_dir, parameters)
    return f"about {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB free"


def describe_versions() -> str:
    """Of Python and the packages that matter; says which are not as requirements.txt has them."""
    found = [f"Python {platform.python_version()}"]
    wanted = read_requirements()
    for name in SHOWN:
        installed = version(name)
        limits = wanted[name].specifier
        odd = "" if limits.contains(installed, prereleases=True) else f" (tested: {limits})"
        found.append(f"{name} {installed}{odd}")
    return ", ".join(found)


def read_requirements() -> dict[str, Requirement]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}
