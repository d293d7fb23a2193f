"""Models on disk: load_model reads every kind of checkpoint, save_best_model writes ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import (
    CONFIG_NAME,
    PYTORCH_WEIGHTS_NAME,
    SAFETENSORS_SINGLE_FILE,
)
from torch import Tensor, nn

from local.config import add_defaults
from local.keys import KEYS
from local.models import MODELS, PUBLISHED, build_model, model_args, model_name
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import UserError
from local.tools.files import read_yaml
from local.tools.weights import (
    HUB_NAME,
    load_checkpoint,
    restore_model,
    save_atomically,
    software_versions,
)


def save_best_model(
    path: Path, state: Mapping[str, Tensor], conf: dict, origin: dict | None = None
) -> None:
    """Writes a best_model.pth: plain data, complete enough to rebuild the model from it alone.

    Args:
        state: of the model, its `state_dict`.
        origin: the entries infos, dataset and licenses, as asteroid calls them.
    """
    origin = origin or {"infos": {}, "dataset": "unknown", "licenses": []}
    content = {
        "model_name": model_name(conf),
        "model_args": model_args(conf),
        "state_dict": {name: tensor.cpu() for name, tensor in state.items()},
        "infos": {"software_versions": software_versions(), **origin["infos"]},
        "dataset": origin["dataset"],
        "task": "music source separation",
        "licenses": origin["licenses"],
    }
    save_atomically(content, path)


class Loaded(NamedTuple):
    """A model from disk.

    Args:
        model: in eval mode, on the CPU.
        name: of it in MODELS.
        arguments: of its constructor.
    """

    model: nn.Module
    name: str
    arguments: dict


def load_model(source: str | Path) -> nn.Module:
    """The model of a checkpoint, in eval mode, on the CPU: see `load_with_arguments`."""
    return load_with_arguments(source).model


def load_with_arguments(source: str | Path, flag: str = "--checkpoint") -> Loaded:
    """The model of a checkpoint, and what it was made with.

    Args:
        source: a best_model.pth (ours, or a published one beside its conf.yml), the folder of a
            run, which holds one, or a Lightning .ckpt of this recipe; or, of ConvTasNetStereo
            alone, a folder written by `save_pretrained`, or the name of a hub repository.
        flag: by which the user has named it.

    Raises:
        UserError: there is no such file, folder or repository, it is damaged, or it holds another
            model.
    """
    try:
        path = _find_file(source)
        if path.is_file():
            return _load_file(path)
        model = ConvTasNetStereo.load(source)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    return Loaded(model, PUBLISHED, model.arguments())


def find_weights(source: str | Path) -> Path | None:
    """The file that holds the weights of a checkpoint; None where there is none."""
    path, names = Path(source), (SAFETENSORS_SINGLE_FILE, PYTORCH_WEIGHTS_NAME)
    if path.is_dir():
        is_run = not (path / CONFIG_NAME).is_file()
        places = [path / name for name in (("best_model.pth",) if is_run else names)]
    elif HUB_NAME.fullmatch(str(source)) and not path.exists():
        cached = (try_to_load_from_cache(str(source), name) for name in names)
        places = [Path(file) for file in cached if isinstance(file, str)]
    else:
        places = [path]
    return next((place for place in places if place.is_file()), None)


def _find_file(source: str | Path) -> Path:
    """The best_model.pth in the folder of a run; of any other source, its own path.

    Raises:
        UserError: it is a folder of another kind.
    """
    path = Path(source)
    if not path.is_dir() or (path / CONFIG_NAME).is_file():
        return path
    if not (path / "best_model.pth").is_file():
        raise UserError(
            f"{path} holds neither the best_model.pth of a run nor the {CONFIG_NAME} of"
            " save_pretrained; name another folder, or a file"
        )
    return path / "best_model.pth"


def _load_file(path: Path) -> Loaded:
    content = load_checkpoint(path)
    name = _find_model_name(content)
    if name not in MODELS:
        raise UserError(f"{path}: holds a {name}; local/models.py has {', '.join(MODELS)}")
    arguments = _find_model_args(path, content)
    model = restore_model(path, content, lambda: build_model(name, arguments))
    # A file may lack arguments whose defaults the constructor has.
    return Loaded(model, name, model.arguments() if name == PUBLISHED else arguments)


def _find_model_name(content: dict) -> str:
    if "model_name" in content:
        return str(content["model_name"])
    conf = content.get("training_config")
    return str(model_name(conf)) if isinstance(conf, dict) else PUBLISHED


def _find_model_args(path: Path, content: dict) -> dict:
    if "model_args" in content:
        return content["model_args"]
    if "training_config" in content:
        conf = content["training_config"]
    else:
        conf_file = path.parent / "conf.yml"
        if not conf_file.is_file():
            raise UserError(f"{path}: holds no model arguments, and there is no {conf_file}")
        conf = read_yaml(conf_file)
    for section in ("convtasnet", "data"):
        if not isinstance(conf, dict) or not isinstance(conf.get(section), dict):
            raise UserError(f"{path}: its configuration has no section {section}")
    is_complete = KEYS["convtasnet"].keys() <= conf["convtasnet"].keys()
    if not is_complete or "sample_rate" not in conf["data"]:
        conf = add_defaults(conf)  # an earlier version did not have these keys
    return model_args(conf)
