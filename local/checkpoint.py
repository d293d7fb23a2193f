"""Models on disk: one way in for every kind of checkpoint, and atomic ways out."""

import io
import os
import pickle
import re
import sys
import zipfile
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import PYTORCH_WEIGHTS_NAME, SAFETENSORS_SINGLE_FILE
from torch import nn
from torch.torch_version import TorchVersion

from local.models import MODELS, PUBLISHED, build_model, model_args, model_name
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import UserError, brief
from local.tools.files import atomic_path, read_yaml

FILE_SUFFIXES = (".pth", ".ckpt")
MUSDB18_LICENSE = {
    "title": "MUSDB18",
    "title_link": "https://sigsep.github.io/datasets/musdb.html",
    "author": "Zafar Rafii, Antoine Liutkus, Fabian-Robert Stöter, Stylianos Ioannis Mimilakis,"
    " Rachel Bittner",
    "license": "academic use only",
    "non_commercial": True,
}


def save_best_model(path: Path, model: nn.Module, conf: dict) -> None:
    """Writes a best_model.pth: plain types and tensors, all that is needed to rebuild the model."""
    packages = ("torch", "pytorch-lightning", "asteroid")
    content = {
        "model_name": model_name(conf),
        "model_args": model_args(conf),
        "state_dict": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "infos": {"software_versions": {name: version(name) for name in packages}},
        "dataset": "MUSDB18",
        "task": "music source separation",
        "licenses": [MUSDB18_LICENSE],
    }
    save_atomically(content, path)


def save_atomically(content: dict, path: Path) -> None:
    """torch.save() that leaves the old file or the whole new one, even where the power fails.

    Raises:
        OSError: it cannot be written; torch.save itself has other words for that.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def load_weights_only(path: Path):
    """torch.load() of a file that holds plain data alone, for the CPU, every byte of it as written.

    Raises:
        Exception: of half a dozen kinds, where the file is damaged, or would run code.
    """
    if zipfile.is_zipfile(path):  # as torch.save has it; torch.load leaves the checksums unread
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise zipfile.BadZipFile(f"{damaged} is not as it was written")
    try:
        # Published files hold torch.__version__ as it is, which is no plain string.
        with torch.serialization.safe_globals([TorchVersion]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch advises to load it as code
        raise ValueError("it is not made of plain data alone") from None


def load_model(source: str | Path) -> nn.Module:
    """The model of a checkpoint, in eval mode, on the CPU.

    Args:
        source: a best_model.pth (ours, or a published one beside its conf.yml) or a Lightning .ckpt
            of this recipe; or, of ConvTasNetStereo alone, a folder written by `save_pretrained`,
            or the name of a hub repository.

    Raises:
        UserError: there is no such thing, it is damaged, or it holds another model.
    """
    path = Path(source)
    if path.is_file():
        return _load_file(path).eval()
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in FILE_SUFFIXES
    if not path.is_dir() and not is_hub_name:
        raise UserError(f"--checkpoint: no such file or folder: {source}")
    try:
        with redirect_stdout(sys.stderr):  # the hub's client talks, and stdout may carry samples
            return ConvTasNetStereo.from_pretrained(str(source)).eval()
    except Exception as error:  # whatever the hub's client, safetensors and torch raise
        kind = "folder" if path.is_dir() else "name: no such file or folder, and from the hub"
        raise UserError(f"--checkpoint {source}: not a usable {kind}: {brief(error)}") from None


def find_weights(source: str | Path) -> Path:
    """The file that holds the weights of a checkpoint that `load_model` has loaded."""
    path = Path(source)
    if path.is_file():
        return path
    names = (SAFETENSORS_SINGLE_FILE, PYTORCH_WEIGHTS_NAME)
    if path.is_dir():
        return next(path / name for name in names if (path / name).is_file())
    cached = (try_to_load_from_cache(str(source), name) for name in names)
    return next(Path(file) for file in cached if isinstance(file, str))


def _load_file(path: Path) -> nn.Module:
    try:
        content = load_weights_only(path)
    except Exception as error:
        raise UserError(
            f"--checkpoint {path}: damaged, cut short, or not made of weights alone: {brief(error)}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"--checkpoint {path}: holds no state_dict, so it is no model")
    name = _find_model_name(content)
    if name not in MODELS:
        raise UserError(
            f"--checkpoint {path}: holds a {name}; local/models.py has {', '.join(MODELS)}"
        )
    # Lightning's names are those of the System, whose model is `model`.
    state = {key.removeprefix("model."): value for key, value in content["state_dict"].items()}
    try:
        model = build_model(name, _find_model_args(path, content))
        model.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--checkpoint {path}: another model: {brief(error)}") from None
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise UserError(f"--checkpoint {path}: its weights hold NaN or infinity")
    return model


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
            raise UserError(
                f"--checkpoint {path}: holds no model arguments, and there is no {conf_file}"
            )
        conf = read_yaml(conf_file)
    try:
        return model_args(conf)
    except (KeyError, TypeError):
        raise UserError(
            f"--checkpoint {path}: its configuration has no convtasnet section or no sample_rate"
        ) from None
