"""What a best_model.pth says of its origin: code, settings, data, and the epoch it is from."""

import os
import subprocess
import unicodedata
from functools import cache
from pathlib import Path

import pytorch_lightning as pl

from local.musdb18_tracks import DEMO_NOTE
from local.tracks.roots import list_roots
from local.tracks.track import Place
from local.train.recipe import ROOT, describe_code

MUSDB18 = "MUSDB18"
DEMO_DATASET = "synthetic songs of local.demo_musdb18"
NAMES = Path(__file__).with_name("musdb18_names.txt")  # of the 150 tracks of both splits
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
    places = [track.place for track in getattr(system.train_loader.dataset, "tracks", ())]
    dataset = name_dataset(list_roots(system.config["data"]["root"]), places)
    hours = {
        name: sum(track.seconds for track in getattr(loader.dataset, "tracks", ())) / 3600
        for name, loader in loaders.items()
    }
    infos = {
        "commit": find_commit(),
        "code": describe_code(),
        "configuration": system.config,
        "epoch": epoch,
        "val_loss": val_loss,
        **tracks,
        "hours": hours,
    }
    if (training := system.config["training"])["init"]:
        infos["base_model"] = {
            "source": training["init"],
            "sha256": training["init_sha256"],
            "partial": training["init_partial"],
        }
    licenses = [MUSDB18_LICENSE] if dataset.startswith(MUSDB18) else []
    return {"infos": infos, "dataset": dataset, "licenses": licenses}


def name_dataset(roots: list[Path], places: list[Place]) -> str:
    """What training tracks are. Those of MUSDB18 are known by their names, also in a part of it and
    among others, whatever a file system does to accents and capitals.
    """
    if all(map(_is_demo, roots)):
        return DEMO_DATASET
    others = [place for place in places if _is_demo(place.root) or not is_musdb18(place.own_name)]
    tracks = f"tracks of {', '.join(map(str, roots))}"
    if len(others) == len(places):
        return tracks
    return f"{MUSDB18}, and other {tracks}" if others else MUSDB18


def is_musdb18(name: str) -> bool:
    """Whether one of MUSDB18's tracks has that name."""
    return _normalise(name) in _list_musdb18()


@cache
def _list_musdb18() -> set[str]:
    return set(map(_normalise, NAMES.read_text(encoding="utf-8").splitlines()))


def _is_demo(root: Path) -> bool:
    return (root / DEMO_NOTE).is_file()


def _normalise(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


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
