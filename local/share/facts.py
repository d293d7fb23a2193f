"""What is known of the best model of a run, without the folders of this machine."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from local.checkpoint import find_weights, load_with_arguments
from local.musdb18_tracks import SOURCES, TARGETS
from local.tools.command_line import UserError, suggest_path
from local.tools.files import sha256
from local.tools.weights import HUB_NAME, load_checkpoint
from local.tracks.roots import list_roots
from local.train.origin import DEMO_DATASET

BEST = "best_model.pth"


class Facts(NamedTuple):
    """A model, and what made it.

    Args:
        exp_dir: of the run.
        model: in eval mode.
        arguments: of its constructor.
        sha256: of best_model.pth.
        content: of best_model.pth, with the names of files and folders in place of their paths.
        licences: of the data, and of the data of the models that it was started from.
        base_hub_name: the repository whose weights it was started from; "" for others, or none.
    """

    exp_dir: Path
    model: nn.Module
    arguments: dict
    sha256: str
    content: dict
    licences: list[dict]
    base_hub_name: str

    @property
    def infos(self) -> dict:
        """What `train.origin.describe_origin` has recorded; published files have less."""
        return self.content["infos"]

    @property
    def dataset(self) -> str:
        return str(self.content.get("dataset", "unknown"))

    @property
    def is_demo(self) -> bool:
        """Whether all of the data were made by local.demo_musdb18."""
        return self.dataset == DEMO_DATASET


def name_sources(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what a model gives, in its order."""
    known = {len(TARGETS): TARGETS, len(SOURCES): SOURCES}
    return known.get(model.C, tuple(f"source_{number}" for number in range(model.C)))


def read_facts(exp_dir: Path) -> Facts:
    """Read the best model of a run.

    Raises:
        UserError: the folder holds none, it is damaged, or cannot be published.
    """
    path = exp_dir / BEST
    if not path.is_file():
        hint = "" if exp_dir.is_dir() else suggest_path(exp_dir)
        raise UserError(f"EXP: {exp_dir} holds no {BEST}; name the folder of a run{hint}")
    loaded = load_with_arguments(path, "EXP")
    if not isinstance(loaded.model, PyTorchModelHubMixin):
        raise UserError(
            f"EXP: {path} holds a {loaded.name}, which is no PyTorchModelHubMixin, so it has no"
            " save_pretrained; give its class that base, as ConvTasNetStereo has it"
        )
    content = load_checkpoint(path)
    if not isinstance(content.get("infos"), dict):
        content["infos"] = {}
    content |= {"model_name": loaded.name, "model_args": loaded.arguments}
    source = str(content["infos"].get("base_model", {}).get("source", ""))  # a path is absolute
    return Facts(
        exp_dir=exp_dir,
        model=loaded.model,
        arguments=loaded.arguments,
        sha256=sha256(path),
        content=hide_folders(content),
        licences=list_licences(content),
        base_hub_name=source if HUB_NAME.fullmatch(source) else "",
    )


def list_licences(content: dict) -> list[dict]:
    """Return the licences of the data of a checkpoint, and of those it was started from that are
    still there.
    """
    found = list(content.get("licenses", ()))
    base = content.get("infos", {}).get("base_model", {})
    file = find_weights(base["source"]) if "source" in base else None
    if file and file.suffix == ".pth" and sha256(file) == base["sha256"]:
        found += [terms for terms in list_licences(load_checkpoint(file)) if terms not in found]
    return found


def hide_folders(content: dict) -> dict:
    """Return the content of a best_model.pth without the folders of the machine that made it."""
    configuration = content["infos"].get("configuration", {})
    roots = list_roots(configuration.get("data", {}).get("root", ()))
    dataset = str(content.get("dataset", "unknown"))
    for root in sorted(map(str, roots), key=len, reverse=True):
        dataset = dataset.replace(root, Path(root).name)
    return {**content, "infos": _shorten(content["infos"]), "dataset": dataset}


def _shorten(value):
    """Replace absolute paths by their last part, that of a run's file by its last two."""
    if isinstance(value, Mapping):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten(item) for item in value]
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    path = Path(value)
    return f"{path.parent.name}/{path.name}" if path.name == BEST else path.name
