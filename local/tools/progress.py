"""Progress of long work: a bar on a terminal, lines with time stamps elsewhere.

All commands show progress this way. --quiet and --progress set what is shown; without them a bar is
drawn where stderr is a terminal.
"""

import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

EVERY = 60.0  # seconds, at least, between two lines of the same work

_flags = {"quiet": False, "progress": False}
_copies: list[Callable[[str], None]] = []


def add_progress_flags(parser: ArgumentParser) -> None:
    """Add --quiet and --progress, of which a command line may have one."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="show results alone, no progress")
    group.add_argument(
        "--progress",
        action="store_true",
        help="draw progress bars even without a terminal [there: lines, at most one a minute]",
    )


def set_progress(quiet: bool, progress: bool) -> None:
    """Set what this process shows from now on, by the flags of `add_progress_flags`."""
    _flags.update(quiet=quiet, progress=progress)


def has_bars() -> bool:
    """Tell whether progress is shown as bars: on a terminal that can move its cursor."""
    if _flags["quiet"] or sys.stderr is None:  # it was closed
        return False
    return _flags["progress"] or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")


class Lines:
    """Progress as lines with a time stamp on stderr, at most one a minute. Used like a tqdm bar.

    Args:
        title: of the work.
        total: what `n` will be at the end; None where that is not known.
        unit: of what is counted, in the plural.
        scale: of a count in this unit.
        leave: print a last line, too, unless the work fails.
        n: what is done already.
    """

    def __init__(
        self,
        title: str,
        total: float | None,
        unit: str,
        scale: float = 1.0,
        leave: bool = False,
        n: float = 0,
    ):
        self.title, self.total, self.unit, self.scale = title, total, unit, scale
        self.leave, self.n, self._before = leave, n, n
        self._start = self._shown = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.leave and error is None:
            self._show()

    def update(self, n: float = 1, note: Callable[[], str] = str) -> None:
        """Count more as done.

        Args:
            note: gives what to add to a line; called only where one is shown.
        """
        self.n += n
        now = time.monotonic()
        is_last = self.leave and self.n == self.total  # its line comes at the end
        if now - self._shown >= EVERY and not is_last:
            self._shown = now
            self._show(note())

    def _show(self, note: str = "") -> None:
        if _flags["quiet"] or sys.stderr is None:
            return
        seconds = time.monotonic() - self._start
        done, total = self.n * self.scale, (self.total or 0) * self.scale
        line = f"{self.title}: {done:.0f}" + (f" of {total:.0f}" if total else "")
        line += f" {self.unit} in {tqdm.format_interval(seconds)}"
        new = self.n - self._before
        if self.total and 0 < new and self.n < self.total:
            left = seconds * (self.total - self.n) / new
            line += f", about {tqdm.format_interval(left)} left"
        with suppress(OSError):  # a log that cannot be written must not end the work
            print(stamp(line + (f", {note}" if note else "")), file=sys.stderr, flush=True)


def show_progress(
    title: str, total: float | None, unit: str, scale: float = 1.0, leave: bool = False
) -> tqdm | Lines:
    """Return a bar or `Lines`, by what is shown: `with show_progress(...) as bar: bar.update()`.

    Args: as of `Lines`.
    """
    if not has_bars():
        return Lines(title, total, unit, scale, leave)
    shown = "{n:.0f}" if total is None else "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}"
    form = f"{{desc}}{shown} {unit} [{{elapsed}}<{{remaining}}]"
    return tqdm(desc=f"{title}: ", total=total, unit_scale=scale, leave=leave, bar_format=form)


def stamp(line: str) -> str:
    """Put the local time before a line."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}"


def say(text: str) -> None:
    """Print on stdout, above the bars, at once."""
    _print(text, sys.stdout)
    keep(text)


def report(line: str, file: TextIO | None = None) -> None:
    """Print a line about a part of long work, with the time unless that goes to a terminal.

    Args:
        file: stdout, unless it is given.
    """
    file = file or sys.stdout
    is_terminal = file is not None and file.isatty()
    _print(line if is_terminal else stamp(line), file)
    keep(line)


def _print(text: str, file: TextIO | None) -> None:
    if file is not None:  # it was closed
        tqdm.write(text, file)
        file.flush()


def keep(text: str) -> None:
    """Hand a text to the functions of `copied_to`."""
    for copy in _copies:
        copy(text)


@contextmanager
def copied_to(copy: Callable[[str], None]) -> Iterator[None]:
    """Hand what is said and reported until the end of the block to a function as well."""
    _copies.append(copy)
    try:
        yield
    finally:
        _copies.remove(copy)
