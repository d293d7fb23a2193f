"""How commands read flags and report errors: a line per fault, and an exit status."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Exit statuses, as shells give them.
INTERRUPTED = 130  # Ctrl-C
CLOSED_PIPE = 141  # the reader of stdout has closed it


class UserError(ValueError):
    """An error that the user can fix. Commands print its message without a traceback."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage of all flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


@contextmanager
def clear_errors(command: str) -> Iterator[None]:
    """Report errors of a command in a line on stderr, and exit.

    The status is 2 for a UserError, INTERRUPTED for Ctrl-C, CLOSED_PIPE for a closed stdout.
    """
    has_stdout = isinstance(sys.stdout, io.TextIOWrapper)  # None where it was closed
    if has_stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files
    try:
        yield
        if has_stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout at exit, and would print an error where that fails.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE) from None
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except UserError as error:
        # The message of an error in a DataLoader worker holds the whole traceback.
        message = str(error).rpartition("DatasetError: ")[2].strip()
        print(f"{command}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def raise_together(faults: list[str], heading: str = "") -> None:
    """Raise one UserError for all faults, a line each. Do nothing where there are none."""
    if len(faults) == 1:
        raise UserError(f"{heading}: {faults[0]}" if heading else faults[0])
    if faults:
        lines = [f"{heading or 'the configuration'}: {len(faults)} faults", *faults]
        raise UserError("\n  ".join(lines))


def brief(error: BaseException, most: int = 300) -> str:
    """Return the message of an error as one line of at most `most` characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]} ..."


def plural(count: int, one: str, more: str = "") -> str:
    """Return a count with its noun: 1 track, 2 tracks."""
    return f"{count} {one if count == 1 else more or one + 's'}"
