"""conf.yml and flags to one checked dictionary, errors to one line, asteroid to an import."""

import argparse
import errno
import importlib
import io
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import nn

from local.fast import FAST
from local.models import (
    MODELS,
    PUBLISHED,
    build_model,
    find_keyword_faults,
    find_shape_fault,
    least_samples,
    sketch_model,
)
from local.musdb18_dataset import DatasetError
from local.recompute import MEMORY

CONF_FILE = Path(__file__).parents[1] / "conf.yml"
EVERY = r"(?:(\d*\.?\d+) ?min|(\d+) ?steps?)"  # how often to take a checkpoint
VALID_METHODS = ("full", "overlap-add")
OPTIONS = ("exp_dir", "check", "resume", "resume_with_changes")
RESUME_HELP = "auto: go on with the run in exp_dir; never; or a checkpoint to go on from [auto]"
CHANGES_HELP = "go on although settings have changed, and record them"
CHECK_HELP = "look at the files, the disk and the devices, say what the run would be, and end"
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C
CLOSED_PIPE = 141  # and to a command whose reader has gone

# The type of every key. conf.yml is there to be edited, so it cannot also be what it is held to.
SCHEMA = {
    "convtasnet": {
        "N": int,
        "L": int,
        "B": int,
        "H": int,
        "P": int,
        "X": int,
        "R": int,
        "C": int,
        "audio_channels": int,
        "norm_type": str,
        "causal": bool,
        "mask_nonlinear": str,
    },
    "training": {
        "model": str,
        "epochs": int,
        "batch_size": int,
        "num_workers": int,
        "half_lr": bool,
        "early_stop": bool,
        "aggregate": int,
        "seed": int,
        "accelerator": str,
        "devices": str,
        "num_nodes": int,
        "precision": str,
        "compile": str,
        "memory": str,
        "fast": str,
        "valid_method": str,
        "max_steps": int,
        "max_skipped_steps": int,
        "checkpoint_every": str,
    },
    "optim": {"lr": float},
    "data": {
        "root": str,
        "mix_background": bool,
        "segment": float,
        "samples_per_track": int,
        "sample_rate": int,
        "suffix": str,
        "valid_tracks": str,
        "max_valid_tracks": int,
    },
    "main_args": {"exp_dir": str},
}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "yes or no", str: "text"}

LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "num_workers": 0,
    "aggregate": 1,
    "seed": 0,
    "num_nodes": 1,
    "samples_per_track": 1,
    "max_skipped_steps": 1,
}
ABOVE_ZERO = ("lr", "segment")
LIMITS = ("max_steps", "max_valid_tracks")
CHOICES = {
    "model": tuple(MODELS),
    "accelerator": ("auto", "cpu", "gpu"),
    "precision": ("32-true", "bf16-mixed", "16-mixed"),
    "compile": ("auto", "yes", "no"),
    "memory": MEMORY,
    "fast": FAST,
    "valid_method": VALID_METHODS,
    "suffix": ("wav", "flac"),
}


class UserError(ValueError):
    """A fault that the person at the keyboard can mend; commands show it without a traceback."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage of fifty flags before it."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


@contextmanager
def clear_errors(command: str) -> Iterator[None]:
    """Ends `command` with its UserError or DatasetError on stderr and exit status 2."""
    has_stdout = isinstance(sys.stdout, io.TextIOWrapper)  # it may be closed
    if has_stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not be in its encoding
    try:
        yield
        if has_stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        # Else Python would complain that it cannot flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE) from None
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (UserError, DatasetError) as error:
        # A loader worker sends its error wrapped in the text of its own traceback.
        message = str(error).rpartition("DatasetError: ")[2].strip()
        print(f"{command}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def is_failed_access(error: OSError, *places: Path) -> bool:
    """Whether a disk failed or was full, or what could not be opened lies in one of the places.

    Anything else comes from code that opens files of its own, whose traceback says where.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        return True
    if not isinstance(error.filename, (str, bytes)):
        return False
    path = Path(os.fsdecode(error.filename)).resolve()
    return any(path.is_relative_to(place.resolve()) for place in places)


def raise_together(faults: list[str], heading: str = "") -> None:
    """Raises one UserError for all faults, a line each; does nothing where there are none."""
    if len(faults) == 1:
        raise UserError(f"{heading}: {faults[0]}" if heading else faults[0])
    if faults:
        lines = [f"{heading or 'the configuration'}: {len(faults)} faults", *faults]
        raise UserError("\n  ".join(lines))


def brief(error: BaseException, most: int = 300) -> str:
    """An error in a line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]} ..."


def plural(count: int, one: str, more: str = "") -> str:
    """A count with its noun: 1 track, 2 tracks."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def import_asteroid(module: str):
    """Imports a module of asteroid whether torchaudio loads, is missing, or fails.

    asteroid imports torchaudio (through torch_stoi) for a loss that this recipe never calls, and
    torchaudio refuses to load beside many torch builds: OSError beside a CPU-only one, RuntimeError
    beside another CUDA. asteroid has a fallback of its own for a missing torch_stoi.
    """
    try:
        importlib.import_module("torchaudio")
    except Exception:
        sys.modules["torch_stoi"] = None
    return importlib.import_module(module)


def parse_conf(argv: list[str] | None = None, conf_file: Path = CONF_FILE) -> dict:
    """conf.yml overridden by the flags, as a dictionary of sections; beside exp_dir, main_args
    says how to run: OPTIONS.

    What the values mean is left to `find_faults`.

    Raises:
        UserError: lists every fault of the file, or names a flag that cannot be parsed.
    """
    conf = read_conf(conf_file)
    parser_utils = import_asteroid("asteroid.utils.parser_utils")
    parser = OneLineParser(
        prog="train.py",
        description="Train a stereo ConvTasNet on MUSDB18. Defaults are in conf.yml.",
    )
    exp_dir = conf.pop("main_args")["exp_dir"]
    # Their keys may have the names of others, which asteroid's parser refuses.
    of_models = {name: conf.pop(name) for name in MODELS if name in conf}
    parser.add_argument("--exp_dir", default=exp_dir)
    parser.add_argument("--check", action="store_true", help=CHECK_HELP)
    parser.add_argument("--resume", default="auto", help=RESUME_HELP)
    parser.add_argument("--resume_with_changes", action="store_true", help=CHANGES_HELP)
    parser.add_argument("--n_src", dest="C", type=int, default=argparse.SUPPRESS, metavar="C")
    parser_utils.prepare_parser_from_dict(conf, parser=parser)
    _keep_text(parser)
    _describe_flags(parser, conf_file)
    parsed = parser_utils.parse_args_as_dict(parser, args=argv)
    # asteroid's result also holds leftovers of argparse: help and an empty positional group.
    conf = {section: parsed[section] for section in conf}
    name = conf["training"]["model"]
    if name in of_models:
        conf[name] = of_models[name]
    conf["main_args"] = {name: parsed["main_args"][name] for name in OPTIONS}
    return conf


def read_conf(path: Path) -> dict:
    """A conf.yml whose every key is known, present and of the right type.

    Raises:
        UserError: lists every fault of the file.
    """
    conf = read_yaml(path)
    of_models = [name for name in MODELS if name in conf and name != PUBLISHED]
    faults = [f"{name}: unknown section" for name in conf if name not in (*SCHEMA, *of_models)]
    for name in of_models:
        conf[name] = {} if conf[name] is None else conf[name]
        faults += find_keyword_faults(name, conf[name])
    for name, keys in SCHEMA.items():
        section = conf.get(name)
        if not isinstance(section, dict):
            faults.append(f"{name}: section missing")
            continue
        faults += [f"{name}.{key}: unknown key" for key in section if key not in keys]
        for key, kind in keys.items():
            if key not in section:
                faults.append(f"{name}.{key}: missing")
                continue
            try:
                section[key] = _as_type(section[key], kind)
            except TypeError:
                faults.append(_wrong_type(f"{name}.{key}", section[key], kind))
    raise_together(faults, heading=str(path))
    return conf


def read_yaml(path: Path) -> dict:
    """A YAML file that holds a mapping.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections such as convtasnet: and training:")
    return content


def find_faults(conf: dict) -> list[str]:
    """What is wrong with the values of a configuration, a line each, named by their flags."""
    values = {key: value for name in SCHEMA for key, value in conf[name].items()}
    faults = [
        f"--{key} must be at least {least}, got {values[key]}"
        for key, least in LEAST.items()
        if values[key] < least
    ]
    faults += [
        f"--{key} must be a number above 0, got {values[key]}"
        for key in ABOVE_ZERO
        if not 0 < values[key] < math.inf
    ]
    faults += [
        f"--{key} must be at least 1, or -1 for no limit, got {values[key]}"
        for key in LIMITS
        if values[key] < 1 and values[key] != -1
    ]
    faults += [
        f"--{key} must be one of {', '.join(allowed)}, got {values[key]}"
        for key, allowed in CHOICES.items()
        if values[key] not in allowed
    ]
    every = values["checkpoint_every"]
    told = re.fullmatch(EVERY, every)
    if not told or float(told[1] or told[2]) == 0:
        faults.append(f"--checkpoint_every must be such as '30 min' or '500 steps', got '{every}'")
    if not values["root"]:
        faults.append("--root is needed: the MUSDB18-HQ folder, with train/ and test/")
    elif not Path(values["root"]).is_dir():
        faults.append(f"--root: no such folder: {values['root']}")
    if values["valid_tracks"] and not Path(values["valid_tracks"]).is_file():
        faults.append(f"--valid_tracks: no such file: {values['valid_tracks']}")
    if not values["exp_dir"]:
        faults.append("--exp_dir must not be empty")
    if values["accelerator"] == "gpu" and not torch.cuda.is_available():
        faults.append("--accelerator gpu: torch sees no GPU; use auto or cpu")
    targets = 2 if values["mix_background"] else 4
    if values["C"] != targets:
        faults.append(
            f"--C must be {targets} with --mix_background {values['mix_background']},"
            f" got {values['C']}"
        )
    if values["audio_channels"] != 2:
        faults.append(f"--audio_channels must be 2 (stereo), got {values['audio_channels']}")
    return faults + _model_faults(conf)


def model_name(conf: dict) -> str:
    """The entry of local/models.py that a configuration names; earlier ones name none."""
    return conf.get("training", {}).get("model", PUBLISHED)


def model_args(conf: dict) -> dict:
    """The keywords of the model's constructor that a configuration gives."""
    network, name = conf["convtasnet"], model_name(conf)
    if name != PUBLISHED:
        shared = {key: network[key] for key in ("C", "audio_channels")}
        network = {**conf.get(name, {}), **shared}
    return {**network, "samplerate": conf["data"]["sample_rate"]}


def count_batches(conf: dict, items: int, ranks: int) -> int:
    """The batches that each rank trains on in an epoch of so many items over all of them."""
    return items // ranks // conf["training"]["batch_size"]


def make_model(conf: dict) -> nn.Module:
    """The model of a configuration, with new weights."""
    return build_model(model_name(conf), model_args(conf))


def count_parameters(conf: dict) -> int:
    """Those of the model of a valid configuration."""
    model = sketch_model(model_name(conf), model_args(conf))
    return sum(parameter.numel() for parameter in model.parameters())


def _model_faults(conf: dict) -> list[str]:
    name, data = model_name(conf), conf["data"]
    if name not in MODELS:
        return []
    try:
        model = sketch_model(name, model_args(conf))
    except (ValueError, TypeError) as error:
        if name == PUBLISHED:
            return [f"--{fault}" for fault in str(error).split("; ")]
        return [f"{name} in conf.yml: {brief(error)}"]
    least = least_samples(model)
    if 0 < data["segment"] * data["sample_rate"] < least:
        frame = f"--L {least}" if name == PUBLISHED else f"{least} samples of {name}"
        return [f"--segment {data['segment']} is shorter than a frame ({frame})"]
    fault = find_shape_fault(model, int(data["segment"] * data["sample_rate"]))
    return [f"--model {name}: {fault}"] if fault else []


def _as_type(value, kind: type):
    """`value` as `kind`, where nothing is lost by it: YAML has 5 for 5.0, null for no text, and
    true for yes.
    """
    if kind is str and value is None:
        return ""
    if kind is str and isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and not isinstance(value, bool) and kind in (float, str):
        return kind(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _wrong_type(name: str, value, kind: type) -> str:
    fault = f"{name}: expected {TYPE_NAMES[kind]}, got {value!r}"
    if kind is float and isinstance(value, str) and re.fullmatch(r"\d+e-?\d+", value):
        fault += f"; YAML reads it as a number when written {value.replace('e', '.0e')}"
    return fault


def _keep_text(parser: argparse.ArgumentParser) -> None:
    """asteroid judges a flag by its default, and takes "yes" or "1" for a yes-or-no flag."""
    texts = {key for keys in SCHEMA.values() for key, kind in keys.items() if kind is str}
    for action in parser._actions:
        if action.dest in texts:
            action.type = str


def _describe_flags(parser: argparse.ArgumentParser, conf_file: Path) -> None:
    """Shows the comments of conf.yml as the help of the flags."""
    comments = dict(re.findall(r"^  (\w+):.*?# (.*)$", conf_file.read_text("utf-8"), re.MULTILINE))
    for action in parser._actions:
        if action.dest in comments:
            default = "" if action.default in ("", argparse.SUPPRESS) else " [%(default)s]"
            action.help = comments[action.dest].replace("%", "%%") + default
