"""How commands report: one line per fault, exit statuses, words for counts."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # the exit status that shells give to Ctrl-C
CLOSED_PIPE = 141  # and to a command whose reader has gone


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
    """Ends `command` with its UserError on stderr and exit status 2."""
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
    except UserError as error:
        # A loader worker sends its error wrapped in the text of its own traceback.
        message = str(error).rpartition("DatasetError: ")[2].strip()
        print(f"{command}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


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
