"""The published folder: built beside its place, and put there as a whole.

Its published.yml lists its files with their SHA-256. A folder that holds anything else, or a file
that was edited since, is never replaced.
"""

import os
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from local import __version__
from local.share.facts import Facts
from local.share.sources import copy_sources
from local.tools.command_line import UserError, brief
from local.tools.files import is_foreign, replaced_folder, sha256

CARD = "README.md"
LIST = "published.yml"


def find_folder_fault(out: Path) -> str:
    """Return why a folder may not be replaced; "" where it may, is empty, or is not there."""
    if not os.path.lexists(out):
        return ""
    if not out.is_dir():
        return f"--out: {out} is no folder; name another"
    found = {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if not path.is_dir() and not is_foreign(path) and "__pycache__" not in path.parts
    }
    listed = read_list(out)
    remedy = "remove it, or name another --out"
    if others := sorted(found - {*listed, LIST}):
        return f"--out: {out} holds {others[0]}, which local.publish has not written; {remedy}"
    edited = [name for name in sorted(found & listed.keys()) if sha256(out / name) != listed[name]]
    if edited:
        return (
            f"--out: {out / edited[0]} was edited since it was published; share it as it is by"
            f" `hf upload USER/NAME {out}`, or {remedy}"
        )
    return ""


def read_list(folder: Path) -> dict[str, str]:
    """Return file -> SHA-256 of a published folder; of any other folder, nothing."""
    try:
        files = yaml.safe_load((folder / LIST).read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return {}


def write_folder(out: Path, facts: Facts, card: ModelCard) -> list[str]:
    """Write the folder of a model, in place of one that `find_folder_fault` has nothing against.

    Returns:
        the names of its files.

    Raises:
        UserError: it cannot be written; what was there before is there still.
    """
    try:
        with replaced_folder(out) as new:
            names = _fill(new, facts, card)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or brief(error)
        raise UserError(f"--out: {out} cannot be written: {reason}") from None
    return names


def _fill(folder: Path, facts: Facts, card: ModelCard) -> list[str]:
    folder.mkdir()
    # First the card: save_pretrained writes another where there is none.
    (folder / CARD).write_text(card.content, encoding="utf-8")
    facts.model.save_pretrained(folder)
    copy_sources(facts.model, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    content = {"version": __version__, "checkpoint": facts.sha256, "files": digests}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (folder / LIST).write_text(text, encoding="utf-8")
    return [*digests, LIST]
