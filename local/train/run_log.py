"""EXP/train.log: what a run prints, each line with the time. A resumed run continues it."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from local.tools.command_line import UserError, brief, describe_error
from local.tools.progress import copied_to, keep, report, stamp


class RunLog:
    """A file that texts are appended to, from `begin` on; what comes before waits for that.

    No text is worth a run: where the file cannot be written, a warning says so once.
    """

    def __init__(self, path: Path):
        self.path, self._waiting, self._has_begun, self._has_failed = path, b"", False, False

    def begin(self) -> None:
        """Called when the run starts. One that is refused before writes nothing."""
        self._has_begun = True
        self._append(self._waiting)

    def add(self, text: str) -> None:
        lines = "".join(f"{stamp(line)}\n" for line in text.strip("\n").splitlines())
        content = lines.encode(errors="backslashreplace")
        if self._has_begun:
            self._append(content)
        else:
            self._waiting += content

    def _append(self, content: bytes) -> None:
        try:
            with open(self.path, "a+b", buffering=0) as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a full disk has cut the last line
                        content = b"\n" + content
                file.write(content)
        except OSError as error:
            if not self._has_failed and sys.stderr is not None:
                print(f"warning: {self.path} cannot be written: {brief(error)}", file=sys.stderr)
            self._has_failed = True


class WarnOnce:
    """With it, what cannot be written does not end a run: the first time, a warning says so.

    Args:
        path: the file or folder that is written.
    """

    def __init__(self, path: Path):
        self.path, self._has_warned = path, False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self._has_warned:
            self._has_warned = True
            warning = f"warning: {self.path} cannot be written: {brief(error)}"
            with suppress(OSError):
                report(warning, sys.stderr)
        return True


@contextmanager
def kept_log(exp_dir: Path, writes: bool) -> Iterator[RunLog]:
    """Keeps in EXP/train.log what is said until the end of the block, warnings, and what ends it.

    Args:
        writes: whether this process does.
    """
    log = RunLog(exp_dir / "train.log")
    if not writes:
        yield log
        return
    show_warning, handler = warnings.showwarning, _Keep(logging.WARNING)

    def show_and_keep(message, category, filename, lineno, file=None, line=None):
        show_warning(message, category, filename, lineno, file, line)
        keep(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = show_and_keep
    logging.getLogger().addHandler(handler)
    with copied_to(log.add):
        try:
            yield log
        except UserError as error:
            keep(f"error: {describe_error(error)}")
            raise
        except SystemExit:  # what raised it has said why
            raise
        except BaseException:
            keep(traceback.format_exc())
            raise
        finally:
            warnings.showwarning = show_warning
            logging.getLogger().removeHandler(handler)


class _Keep(logging.Handler):
    """Keeps what libraries log."""

    def emit(self, record):
        keep(self.format(record))
