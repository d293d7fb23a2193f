"""The folder of a page, which replaces only an older page."""

import os
from pathlib import Path

from local.tools.command_line import UserError
from local.tools.files import is_foreign

GENERATOR = "local.page"
MARK = f'<meta name="generator" content="{GENERATOR}">'  # in index.html
CONTENT = {"index.html", "page.css", "page.js", "tracks"}


def check_folder(out: Path) -> None:
    """Raise a UserError unless `out` is absent, and can be made, or empty, or a page made here."""
    parent = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not parent.is_dir():
        raise UserError(f"--out: {parent} is no folder; name another --out")
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
