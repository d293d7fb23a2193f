"""Weights on disk as plain data: written atomically, read without running code."""

import inspect
import io
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, get_hf_file_metadata, hf_hub_url
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from torch.torch_version import TorchVersion

from local import __version__
from local.tools.command_line import UserError, brief, suggest_path
from local.tools.files import atomic_path

FOLDER = 0x10  # an attribute of an entry of a zip file
FILE_SUFFIXES = (".pth", ".ckpt")
REMEDY = "name a best_model.pth, a .ckpt or a run's folder"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class HubModel(PyTorchModelHubMixin):
    """A model that reads its own files and repositories of the Hugging Face hub.

    It has each argument of its constructor as an attribute of that name.
    """

    @classmethod
    def from_pretrained(cls, source: str | Path, *, strict: bool = True, **kwargs):
        """As the mixin, but strict, so that another model's weights are refused."""
        return super().from_pretrained(source, strict=strict, **kwargs)

    @classmethod
    def load(cls, source: str | Path):
        """A trained model, in eval mode, on the CPU.

        Args:
            source: a best_model.pth of this recipe, a folder written by `save_pretrained`, or the
                name of a hub repository.

        Raises:
            UserError: a ValueError: `source` is none of these, is damaged, or is another model.
        """
        path = Path(source)
        if path.is_file():
            content = load_checkpoint(path)
            name = content.get("model_name", cls.__name__)
            if name != cls.__name__:
                raise UserError(f"{path}: holds a {name}, not a {cls.__name__}")
            if "model_args" not in content:
                raise UserError(
                    f"{path}: holds no model_args; local.checkpoint.load_model reads such files"
                )
            return restore_model(path, content, lambda: cls(**content["model_args"]))
        is_folder = path.is_dir()
        if not is_folder and not _is_hub_name(source):
            raise UserError(f"no such file or folder: {source}{suggest_path(path)}")
        is_offline = not is_folder and not _has_answer_of_hub(str(source))
        try:
            with redirect_stdout(sys.stderr):  # the hub's client prints, and stdout may be samples
                return cls.from_pretrained(str(source), local_files_only=is_offline).eval()
        except Exception as error:  # whatever the hub's client, safetensors and torch raise
            if is_offline and isinstance(error, LocalEntryNotFoundError):
                fault = f"{source}: no such file or folder, and none from the hub, which cannot be"
                remedy = "check the name or the connection"
                raise UserError(f"{fault} reached; {remedy}{suggest_path(path)}") from None
            kind = "folder" if is_folder else "name: no such file or folder, and from the hub"
            raise UserError(f"{source}: not a usable {kind}: {brief(error)}") from None

    def arguments(self) -> dict:
        """The arguments of its constructor."""
        return {key: getattr(self, key) for key in inspect.signature(type(self)).parameters}

    def serialize(self) -> dict:
        """The model as plain data: after `torch.save`, `load` rebuilds it.

        Returns:
            model_name, model_args, state_dict and infos, which holds software_versions.
        """
        return {
            "model_name": type(self).__name__,
            "model_args": self.arguments(),
            "state_dict": self.state_dict(),
            "infos": {"software_versions": software_versions()},
        }


def _is_hub_name(source: str | Path) -> bool:
    """Whether a source that is not there may be a repository of the hub. It is taken for a path
    where its first part is a folder, as in exp/demos beside exp/demo.
    """
    path = Path(source)
    is_path = path.suffix in FILE_SUFFIXES or os.path.isdir(path.parent)
    return bool(HUB_NAME.fullmatch(str(source))) and not is_path


def _has_answer_of_hub(name: str) -> bool:
    """Whether the hub can be reached, for its client would try again for half a minute."""
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME))
    except HfHubHTTPError:
        pass  # an answer, that it has no such file, say
    except Exception:  # of several kinds
        return False
    return True


def software_versions() -> dict[str, str]:
    """Those of this recipe, and of the installed packages that train a model."""
    found = {"recipe": __version__}
    for name in ("torch", "pytorch-lightning", "asteroid"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def save_atomically(content: dict, path: Path) -> None:
    """torch.save() that leaves the old file or the complete new one, even at a power failure.

    Raises:
        OSError: it cannot be written; torch.save itself raises another error then.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def load_weights_only(path: Path):
    """torch.load() of plain data to the CPU, with the checksums of the file verified.

    Raises:
        Exception: of several kinds, if the file is damaged or would run code.
    """
    if zipfile.is_zipfile(path):  # as torch.save writes it; torch.load skips the checksums
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            # Of what is marked as a folder torch reads nothing, and leaves its tensor unset.
            if any(entry.external_attr & FOLDER for entry in file.infolist()):
                raise zipfile.BadZipFile("wrong attributes")
    try:
        # Published files hold torch.__version__ itself, which is a subclass of str.
        with torch.serialization.safe_globals([TorchVersion]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch advises to load it as code
        raise ValueError("it is not made of plain data alone") from None


def load_checkpoint(path: Path) -> dict:
    """The content of a file that holds a state_dict.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        content = load_weights_only(path)
    except Exception as error:
        raise UserError(
            f"{path}: damaged, cut short or another kind of file: {brief(error)}; {REMEDY}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: holds no state_dict, so it is no model; {REMEDY}")
    return content


def restore_model(path: Path, content: dict, make_model: Callable[[], nn.Module]) -> nn.Module:
    """A new model with the weights of a checkpoint, in eval mode.

    Raises:
        UserError: it cannot be made, the weights are of another model, or hold NaN or infinity.
    """
    # Lightning's names are those of the System, whose model is `model`.
    state = {key.removeprefix("model."): value for key, value in content["state_dict"].items()}
    try:
        model = make_model()
        model.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: another model: {brief(error)}") from None
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise UserError(f"{path}: its weights hold NaN or infinity")
    return model.eval()
