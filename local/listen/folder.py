"""The folder of a page: it appears when it is complete, and replaces only an older page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local.tools.command_line import UserError
from local.tools.files import atomic_path, is_foreign

GENERATOR = "local.page"
MARK = f'<meta name="generator" content="{GENERATOR}">'  # in index.html
CONTENT = {"index.html", "page.css", "page.js", "tracks"}


def check_folder(out: Path) -> None:
    """Raise a UserError where `out` is neither absent, nor empty, nor a page made here."""
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"--out: {out} is no folder; name another --out")
    others = sorted(path.name for path in out.iterdir() if not is_foreign(path))
    if unknown := [name for name in others if name not in CONTENT]:
        raise UserError(f"--out: {out} holds other files ({unknown[0]}); name another --out")
    if others and not _has_mark(out / "index.html"):
        raise UserError(f"--out: {out} holds a page of others; name another --out")


def _has_mark(index: Path) -> bool:
    try:
        return MARK in index.read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        return False


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`, which takes its place at the end of the block.

    If the block raises, `out` stays as it was.

    Raises:
        UserError: see `check_folder`.
    """
    check_folder(out)
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None
    # A folder that is not empty cannot be replaced by renaming, so the old page steps aside.
    old = out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():  # an earlier run was killed between the two renames
        os.replace(old, out)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
    shutil.rmtree(old, ignore_errors=True)
