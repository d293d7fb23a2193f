"""What a best_model.pth says of its origin: code, settings, data, and the epoch it is from."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytorch_lightning as pl

from local.musdb18_tracks import DEMO_NOTE, VALIDATION_TRACKS
from local.tracks.roots import list_roots
from local.tracks.track import Place
from local.train.recipe import ROOT, describe_code

MUSDB18 = "MUSDB18"
MUSDB18_LICENSE = {
    "title": MUSDB18,
    "title_link": "https://sigsep.github.io/datasets/musdb.html",
    "author": "Zafar Rafii, Antoine Liutkus, Fabian-Robert Stöter, Stylianos Ioannis Mimilakis,"
    " Rachel Bittner",
    "license": "academic use only",
    "non_commercial": True,
}


def describe_origin(system: pl.LightningModule, epoch: int, val_loss: float) -> dict:
    """The entries infos, dataset and licenses of a best_model.pth, as plain data."""
    loaders = {"training_tracks": system.train_loader, "validation_tracks": system.val_loader}
    tracks = {
        name: [track.name for track in getattr(loader.dataset, "tracks", ())]
        for name, loader in loaders.items()
    }
    places = [
        track.place
        for loader in loaders.values()
        for track in getattr(loader.dataset, "tracks", ())
    ]
    dataset = name_dataset(list_roots(system.config["data"]["root"]), places)
    infos = {
        "commit": find_commit(),
        "code": describe_code(),
        "configuration": system.config,
        "epoch": epoch,
        "val_loss": val_loss,
        **tracks,
    }
    licenses = [MUSDB18_LICENSE] if dataset == MUSDB18 else []
    return {"infos": infos, "dataset": dataset, "licenses": licenses}


def name_dataset(roots: list[Path], places: list[Place]) -> str:
    """MUSDB18 where any track of it is known by its name, and so in copies of parts of it, too.

    The names that are known are those of the validation tracks, of which every copy has some.
    """
    if all(map(_is_demo, roots)):
        return "synthetic songs of local.demo_musdb18"
    names = {place.own_name for place in places if not _is_demo(place.root)}
    return MUSDB18 if names & set(VALIDATION_TRACKS) else f"tracks of {', '.join(map(str, roots))}"


def _is_demo(root: Path) -> bool:
    return (root / DEMO_NOTE).is_file()


@cache  # of the code as it was when the run started
def find_commit() -> str:
    """The git commit of this code, and whether its files have changed since; "unknown" where git
    does not know them.
    """
    try:
        commit = _run_git("rev-parse", "HEAD")
        _run_git("ls-files", "--error-unmatch", "train.py")  # else of a repository around this one
        changed = _run_git("status", "--porcelain", "--", "train.py", "local/*.py")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}, with local changes" if changed else commit


def _run_git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    # A hook of git sets GIT_DIR, for example.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=30, env=environment
    )
    return result.stdout.strip()
