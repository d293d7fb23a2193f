"""conf.yml and the flags of train.py: one table of keys, one checked dictionary."""

import math
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from local.tools.choices import FAST, MEMORY, MISSING_STEMS, SUFFIX
from local.tools.command_line import OneLineParser, UserError, raise_together, suggest
from local.tools.files import read_yaml
from local.tools.progress import add_progress_flags
from local.tools.values import as_kind, describe_wrong_kind, join_paths, read_word

CONF_FILE = Path(__file__).parents[1] / "conf.yml"
INTERVAL = re.compile(r"(?:(\d*\.?\d+) ?min|(\d+) ?steps?)")


class Key(NamedTuple):
    """A key of conf.yml and flag of train.py. Its default and its help are in conf.yml.

    Args:
        least: the smallest value.
        above_zero: any number above zero.
        limit: at least 1, or -1 for no limit.
        choices: all there are.
        is_path: whether ~ stands for a home folder.
        is_free: whether a resumed run computes the same with another value. Of the tracks under
            root and of the devices, it matters what they are, not how they are named.
    """

    kind: type
    least: int | None = None
    above_zero: bool = False
    limit: bool = False
    choices: tuple[str, ...] = ()
    is_path: bool = False
    is_free: bool = False


KEYS = {
    "convtasnet": {  # local/tasnet.py checks their values
        "N": Key(int),
        "L": Key(int),
        "B": Key(int),
        "H": Key(int),
        "P": Key(int),
        "X": Key(int),
        "R": Key(int),
        "C": Key(int),
        "audio_channels": Key(int),
        "norm_type": Key(str),
        "causal": Key(bool),
        "mask_nonlinear": Key(str),
    },
    "training": {
        "model": Key(str),
        "epochs": Key(int, limit=True, is_free=True),
        "batch_size": Key(int, least=1),
        "num_workers": Key(int, least=0, is_free=True),
        "half_lr": Key(bool),
        "early_stop": Key(bool),
        "aggregate": Key(int, least=1),
        "seed": Key(int, least=0),
        "accelerator": Key(str, choices=("auto", "cpu", "gpu"), is_free=True),
        "devices": Key(str, is_free=True),
        "num_nodes": Key(int, least=1, is_free=True),
        "precision": Key(str, choices=("32-true", "bf16-mixed", "16-mixed")),
        "compile": Key(str, choices=("auto", "yes", "no")),
        "memory": Key(str, choices=MEMORY),
        "fast": Key(str, choices=FAST),
        "valid_method": Key(str, choices=("full", "overlap-add")),
        "max_steps": Key(int, limit=True),
        "max_skipped_steps": Key(int, least=1, is_free=True),
        "checkpoint_every": Key(str, is_free=True),
    },
    "optim": {"lr": Key(float, above_zero=True)},
    "data": {
        "root": Key(list, is_path=True, is_free=True),
        "mix_background": Key(bool),
        "segment": Key(float, above_zero=True),
        "samples_per_track": Key(int, least=1),
        "sample_rate": Key(int),
        "suffix": Key(str, choices=SUFFIX, is_free=True),
        "stem_names": Key(str),
        "missing_stems": Key(str, choices=MISSING_STEMS),
        "valid_tracks": Key(str, is_path=True, is_free=True),
        "max_valid_tracks": Key(int, limit=True),
    },
    "main_args": {"exp_dir": Key(str, is_path=True, is_free=True)},
}
FREE = {name for keys in KEYS.values() for name, key in keys.items() if key.is_free}
# Flags alone: how to run, no part of the configuration.
OPTIONS = dict(check=False, resume="auto", resume_with_changes=False, quiet=False, progress=False)


def parse_conf(argv: list[str] | None = None, conf_file: Path = CONF_FILE) -> dict:
    """conf.yml, or the file of --conf, overridden by the flags.

    Returns:
        section -> key -> value; main_args holds OPTIONS, too.

    What the values mean is left to `find_faults`.

    Raises:
        UserError: lists every fault of the file, or names a flag that cannot be parsed.
    """
    conf = read_conf(conf_file)
    parser = _make_parser(conf, conf_file)
    flags = vars(parser.parse_args(argv))
    if flags["conf"]:
        try:
            conf = read_saved_conf(flags["conf"])
        except UserError as error:
            raise UserError(f"--conf {error}") from None
        parser.set_defaults(**{key: conf[name][key] for name, keys in KEYS.items() for key in keys})
        flags = vars(parser.parse_args(argv))
    parsed = {
        section: {key: join_paths(flags[key]) for key in keys} for section, keys in KEYS.items()
    }
    parsed["main_args"] |= {option: flags[option] for option in OPTIONS}
    name = parsed["training"]["model"]
    if name in conf and name not in KEYS:
        parsed[name] = conf[name]  # the keywords of another model
    return parsed


def _make_parser(conf: dict, conf_file: Path) -> OneLineParser:
    parser = OneLineParser(
        prog="train.py",
        description="Train a stereo ConvTasNet on MUSDB18. Defaults are in conf.yml.",
    )
    add = parser.add_argument
    add("--check", action="store_true", help="check everything, describe the run, and end")
    add(
        "--conf",
        type=Path,
        metavar="FILE",
        help="a conf.yml that a run has saved, instead of conf.yml; flags override it",
    )
    add(
        "--resume",
        type=os.path.expanduser,
        default=OPTIONS["resume"],
        help="auto: the run in exp_dir, if there is one; never; or a last-*.ckpt [%(default)s]",
    )
    add(
        "--resume_with_changes",
        action="store_true",
        help="resume although settings, tracks,"
        " devices or code have changed, and record the changes",
    )
    add_progress_flags(parser)
    text = conf_file.read_text(encoding="utf-8")
    comments = dict(re.findall(r"^  (\w+):.*?# (.*)$", text, re.MULTILINE))
    for section, keys in KEYS.items():
        group = parser.add_argument_group(section)
        for name, key in keys.items():
            default = conf[section][name]
            shown = comments.get(name, "").replace("%", "%%")
            shown += "" if default == "" else " [%(default)s]"
            names = [f"--{name}", "--n_src"] if name == "C" else [f"--{name}"]
            kind = os.path.expanduser if key.is_path else partial(read_word, key.kind)
            words = {"type": kind, "nargs": "+" if key.kind is list else None}
            group.add_argument(*names, dest=name, default=default, help=shown, **words)
    return parser


def read_conf(path: Path = CONF_FILE) -> dict:
    """A conf.yml whose every key is known, present and of the right type.

    Raises:
        UserError: lists every fault of the file.
    """
    return _check_types(read_yaml(path), path)


def read_saved_conf(path: Path) -> dict:
    """The conf.yml of a run, of any version of this recipe or of the published one.

    Keys that it lacks have the defaults of conf.yml. If it lies in the folder of a run, exp_dir is
    that folder, which may have been moved.

    Args:
        path: of the file, or of the folder of the run.

    Raises:
        UserError: lists every fault of the file.
    """
    path = path / "conf.yml" if path.is_dir() else path
    conf = {name: {} if section is None else section for name, section in read_yaml(path).items()}
    wrong = [name for name, section in conf.items() if not isinstance(section, dict)]
    raise_together([f"{name}: expected a section, got {conf[name]!r}" for name in wrong], str(path))
    # The published recipe's parser leaves these.
    if conf.get("positional arguments") == {}:
        del conf["positional arguments"]
    if conf.get("main_args", {}).get("help", "") is None:
        del conf["main_args"]["help"]
    conf = _check_types({**read_conf(), **add_defaults(conf)}, path)
    if (path.parent / "checkpoints").is_dir():
        conf["main_args"]["exp_dir"] = str(path.parent)
    return conf


def _check_types(conf: dict, path: Path) -> dict:
    """What was read from `path`, if every key is known, present and of the right type."""
    faults = []
    for name in [name for name in conf if name not in KEYS]:
        conf[name] = {} if conf[name] is None else conf[name]
        faults += _find_section_faults(name, conf[name])
    for name, keys in KEYS.items():
        section = conf.get(name)
        if not isinstance(section, dict):
            faults.append(f"{name}: section missing")
            continue
        unknown = [key for key in section if key not in keys]
        faults += [f"{name}.{key}: unknown key{suggest(str(key), keys)}" for key in unknown]
        for key, (kind, *_) in keys.items():
            if key not in section:
                faults.append(f"{name}.{key}: missing")
                continue
            try:
                section[key] = as_kind(section[key], kind)
            except TypeError:
                faults.append(describe_wrong_kind(f"{name}.{key}", section[key], kind))
    raise_together(faults, heading=str(path))
    return conf


def _find_section_faults(name: str, keywords) -> list[str]:
    """What is wrong with a section that is not in KEYS, which another model may have."""
    from local.models import MODELS, PUBLISHED, find_keyword_faults

    if name not in MODELS or name == PUBLISHED:
        return [f"{name}: unknown section{suggest(str(name), KEYS)}"]
    return find_keyword_faults(name, keywords)


def add_defaults(conf: dict) -> dict:
    """A saved configuration, with the defaults of conf.yml for keys that it lacks: an earlier
    version had none, and did what the default does.
    """
    defaults = read_conf()
    return {name: {**defaults.get(name, {}), **conf.get(name, {})} for name in {**conf, **KEYS}}


def find_faults(conf: dict) -> list[str]:
    """What is wrong with the values of a configuration, a line each, named by their flags."""
    import torch

    from local.models import find_model_faults
    from local.musdb18_tracks import find_data_faults

    values = {name: conf[section][name] for section, keys in KEYS.items() for name in keys}
    faults = []
    for keys in KEYS.values():
        for name, key in keys.items():
            faults += [
                f"--{name} must be {rule}, got {values[name]}"
                for rule in _find_broken_rules(values[name], key)
            ]
    if read_interval(values["checkpoint_every"]) is None:
        faults.append(
            "--checkpoint_every must look like '30 min' or '500 steps',"
            f" got '{values['checkpoint_every']}'"
        )
    faults += find_data_faults(conf["data"])
    if not values["exp_dir"]:
        faults.append("--exp_dir must not be empty")
    targets = 2 if values["mix_background"] else 4
    if values["C"] != targets:
        word = "yes" if values["mix_background"] else "no"
        faults.append(f"--C must be {targets} with --mix_background {word}, got {values['C']}")
    if values["audio_channels"] != 2:
        faults.append(f"--audio_channels must be 2 (stereo), got {values['audio_channels']}")
    if values["accelerator"] == "gpu" and not torch.cuda.is_available():
        faults.append("--accelerator gpu: torch sees no GPU; use auto or cpu")
    return faults + find_model_faults(conf)


def _find_broken_rules(value, key: Key) -> Iterator[str]:
    """What a value must be and is not."""
    if key.least is not None and value < key.least:
        yield f"at least {key.least}"
    if key.above_zero and not 0 < value < math.inf:
        yield "a number above 0"
    if key.limit and value < 1 and value != -1:
        yield "at least 1, or -1 for no limit"
    if key.choices and value not in key.choices:
        yield f"one of {', '.join(key.choices)}"


def read_interval(text: str) -> tuple[float, int] | None:
    """(seconds, steps), one of them infinite or 0, of "30 min" or "500 steps"; None of others."""
    found = INTERVAL.fullmatch(text)
    if not found or float(found[1] or found[2]) == 0:
        return None
    return 60 * float(found[1] or math.inf), int(found[2] or 0)
