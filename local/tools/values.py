"""The values of settings: a word of the command line, or a value of YAML, as the kind expected."""

import argparse
import os
import re

KIND_NAMES = {
    **{int: "a whole number", float: "a number", bool: "yes or no", str: "text"},
    list: "a path or a list of paths",
}
WORDS = {
    **dict.fromkeys(("yes", "true", "y", "1"), True),
    **dict.fromkeys(("no", "false", "n", "0"), False),
}


def read_word(kind: type, word: str):
    """A word of the command line as `kind`.

    Raises:
        argparse.ArgumentTypeError: it is another kind.
    """
    try:
        return WORDS[word.lower()] if kind is bool else kind(word)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"expected {KIND_NAMES[kind]}, got {word!r}") from None


def as_kind(value, kind: type):
    """A value of YAML as `kind`, where nothing is lost by it: YAML has 5 for 5.0, null for no text,
    and true for yes.

    Raises:
        TypeError: it is another kind.
    """
    if kind is list:
        is_list = type(value) is list
        return [as_kind(each, str) for each in value] if is_list else as_kind(value, str)
    if kind is str and value is None:
        return ""
    if kind is str and isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and not isinstance(value, bool) and kind in (float, str):
        return kind(value)
    if type(value) is not kind:
        raise TypeError
    return value


def join_paths(value):
    """A list of one path as that path, of several with ~ expanded; other values as they are."""
    paths = list(map(os.path.expanduser, value)) if isinstance(value, list) else [value]
    return paths[0] if len(paths) == 1 else paths


def describe_wrong_kind(name: str, value, kind: type) -> str:
    fault = f"{name}: expected {KIND_NAMES[kind]}, got {value!r}"
    if kind is float and isinstance(value, str) and re.fullmatch(r"\d+e-?\d+", value):
        fault += f"; YAML reads it as a number when written {value.replace('e', '.0e')}"
    return fault


def find_changed_setting(before: dict, now: dict) -> str:
    """Return which setting of the making of estimates or scores differs, "" if none does."""
    if before.get("checkpoint") != now.get("checkpoint"):
        return "made with another checkpoint"
    code = now.get("model_code")
    if before.get("model_code", code) != code:  # records of earlier versions have none
        return "made with other code of the model"
    for key in {**now, **before}:
        if before.get(key) != now.get(key) and key != "model_code":
            return f"made with {key} {before.get(key)}, not {now.get(key)}"
    return ""
