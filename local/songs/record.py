"""FOLDER/made_from.yml: what made the estimates of a song, by which a later run knows them."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from local import __version__
from local.tools.choices import PRECISIONS
from local.tools.command_line import UserError
from local.tools.files import atomic_path, sha256
from local.tools.formats import FORMATS
from local.tools.values import find_changed_setting

NAME = "made_from.yml"
EARLIER = {"PCM_16": "wav16", "FLOAT": "float32"}  # names of formats, by earlier versions


def plan_record(song: Path, settings: dict, form: str) -> dict:
    """Return the record that the estimates of a song will have.

    Args:
        settings: see `estimates.describe_settings`.
        form: of the files, one of FORMATS.

    Raises:
        UserError: the song cannot be read.
    """
    try:
        digest = sha256(song)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    return {
        "song": digest,
        "damage": "",
        "made_with": settings,
        "format": form,
        "version": __version__,
    }


def save_record(folder: Path, record: dict) -> None:
    with atomic_path(folder / NAME) as file:
        file.write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")


def is_made(folder: Path, files: Iterable[str], wanted: dict, overwrite: bool) -> bool:
    """Tell whether all files of a folder are there, and need not be made again.

    Args:
        files: their names without what the format adds.
        wanted: the record that they would have.

    Raises:
        UserError: they are there, but of another song or by other settings.
    """
    suffix = FORMATS[wanted["format"]].suffix
    if overwrite or not all((folder / f"{file}.{suffix}").is_file() for file in files):
        return False
    if fault := find_fault(folder, wanted):
        advice = "--overwrite makes them again, --out writes elsewhere"
        raise UserError(f"{folder} holds {fault}; {advice}")
    return True


def find_fault(folder: Path, wanted: dict) -> str:
    """Return what a folder of estimates holds in place of those that a run would make; "" for them.

    Args:
        wanted: the record that they would have.
    """
    try:
        found = yaml.safe_load((folder / NAME).read_text(encoding="utf-8"))
        is_same_song = found["song"] == wanted["song"]
        before = {"precision": PRECISIONS[0], **found["made_with"]}  # earlier versions had no other
        change = find_changed_setting(before, wanted["made_with"])
        form, damage = EARLIER.get(found["format"], found["format"]), found["damage"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return f"estimates, but no record of what made them ({NAME})"
    if not is_same_song:
        return "estimates of another song, or of this one before it was changed"
    if change:
        return f"estimates {change}"
    if form != wanted["format"]:
        return f"estimates saved as {form}, not {wanted['format']}"
    return f"what could be separated of a damaged song: {damage}" if damage else ""
