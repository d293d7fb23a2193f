"""conf.yml and the flags of train.py to one dictionary."""

import os
import re
from functools import partial
from pathlib import Path

from local.keys import KEYS
from local.tools.command_line import OneLineParser, UserError, raise_together, suggest
from local.tools.files import read_yaml
from local.tools.progress import add_progress_flags
from local.tools.values import as_kind, describe_wrong_kind, join_paths, read_word

CONF_FILE = Path(__file__).parents[1] / "conf.yml"
# How to run, no part of the configuration. All are flags but `typed`: with --init, the keys that
# the model of --init must agree with.
OPTIONS = dict(check=False, resume="auto", resume_with_changes=False, quiet=False, progress=False)
OPTIONS |= dict(typed=())


def parse_conf(argv: list[str] | None = None, conf_file: Path = CONF_FILE) -> dict:
    """conf.yml, or the file of --conf, overridden by the flags.

    Returns:
        section -> key -> value; main_args holds OPTIONS, too.

    What the values mean is left to `keys.find_faults`.

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
    flags["typed"] = _list_typed(parser, argv, flags) if flags["init"] else OPTIONS["typed"]
    parsed["main_args"] |= {option: flags[option] for option in OPTIONS}
    if "init" in flags["typed"] and "init_sha256" not in flags["typed"]:
        parsed["training"]["init_sha256"] = ""  # in the file of --conf it is that of other weights
    name = parsed["training"]["model"]
    if name in conf and name not in KEYS:
        parsed[name] = conf[name]  # the keywords of another model
    return parsed


def _list_typed(parser: OneLineParser, argv: list[str] | None, flags: dict) -> tuple[str, ...]:
    """The keys on the command line, and those beside init in the file of --conf that names it."""
    typed = parser.list_typed(argv)
    if "init" not in typed and flags["conf"]:
        sections = read_yaml(find_conf_file(flags["conf"])).values()
        typed += [key for section in sections for key in section or ()]
    return tuple(typed)


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


def find_conf_file(path: Path) -> Path:
    """The conf.yml in the folder of a run, or the file itself."""
    return path / "conf.yml" if path.is_dir() else path


def read_saved_conf(path: Path) -> dict:
    """The conf.yml of a run, of any version of this recipe or of the published one.

    Keys that it lacks have the defaults of conf.yml. If it lies in the folder of a run, exp_dir is
    that folder, which may have been moved.

    Args:
        path: of the file, or of the folder of the run.

    Raises:
        UserError: lists every fault of the file.
    """
    path = find_conf_file(path)
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
