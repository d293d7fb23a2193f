"""How commands read flags and report errors: a line per fault, and an exit status."""

import argparse
import difflib
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from local import __version__

# Exit statuses, as shells give them.
INTERRUPTED = 130  # Ctrl-C
CLOSED_PIPE = 141  # the reader of stdout has closed it


class UserError(ValueError):
    """An error that the user can fix. Commands print its message without a traceback."""


class OneLineParser(argparse.ArgumentParser):
    """The parser of every command.

    It reports errors in one line, without the usage of all flags. A flag may be spelled with - for
    _, and `type=Path` expands ~, which a shell leaves as it is in --root=~/MUSDB18.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but unknown flags are errors, also where a required one is missing."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        faults = []
        for place, word in enumerate(words[:end]):
            name, equals, value = word.partition("=")
            flag = self._find_flag(name)
            if flag and name.startswith("--"):
                words[place] = f"{flag}{equals}{value}"
            elif flag:
                faults.append(f"there is no flag {name}; did you mean {flag}?")
            elif name.startswith("--") and " " not in name:  # else no flag, by argparse's rules
                meant = suggest(f"--{name[2:].replace('-', '_')}", self._option_string_actions)
                faults.append(f"there is no flag {name}{meant}")
        if faults:
            self.error("; ".join(faults))
        return super().parse_known_args(words, namespace)

    def list_typed(self, args=None) -> list[str]:
        """Return the names of the flags that `args` has."""
        untyped = argparse.Namespace(**{action.dest: None for action in self._actions})
        found = vars(self.parse_args(args, untyped))
        return [name for name, value in found.items() if value not in (None, [])]

    def _find_flag(self, name: str) -> str:
        """Return the long flag that is meant by -out, --exp-dir or --exp_dir; "" for none."""
        flags = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        word = name.removeprefix("-").removeprefix("-")
        dashed = f"--{word.replace('_', '-')}"
        return flags.get(dashed, "") if name[:1] == "-" and len(name) > 2 else ""


@contextmanager
def clear_errors(command: str) -> Iterator[None]:
    """Report errors of a command in a line on stderr, and exit.

    The status is 2 for a UserError or where memory ran out, INTERRUPTED for Ctrl-C, CLOSED_PIPE for
    a closed stdout.
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
        print(f"{command}: error: {describe_error(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        from local.tools.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"{command}: error: out of memory: {brief(error)}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def cleaning_up_on_sigterm() -> Iterator[None]:
    """End by SystemExit on SIGTERM, so that unfinished files are removed."""
    handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def describe_error(error: UserError) -> str:
    """Return its message; that of an error in a DataLoader worker holds the whole traceback."""
    return str(error).rpartition("DatasetError: ")[2].strip()


def raise_together(faults: list[str], heading: str = "") -> None:
    """Raise one UserError for all faults, a line each. Do nothing where there are none."""
    if len(faults) == 1:
        raise UserError(f"{heading}: {faults[0]}" if heading else faults[0])
    if faults:
        count = f"{len(faults)} faults"
        raise UserError("\n  ".join([f"{heading}: {count}" if heading else count, *faults]))


def suggest(word: str, known: Iterable[str], folder: Path = Path()) -> str:
    """Return "; did you mean" and the name that was probably meant; "" where there is none.

    Args:
        folder: that the names are in, which is shown before them.
    """
    names = sorted(known)
    longer = [name for name in names if name.startswith(word)]
    found = longer[:3] or difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    shown = " or ".join(str(folder / name) for name in found)
    return f"; did you mean {shown}?" if found else ""


def suggest_path(path: Path | str) -> str:
    """As `suggest`, of a path that is not there, up to its first part that is not."""
    path = Path(path)
    steps = (*reversed(path.parents), path)
    missing = next((step for step in steps if not os.path.exists(step)), None)
    if missing is None:
        return ""
    names = [path.name for path in missing.parent.glob("[!.]*")]
    return suggest(missing.name, names, missing.parent)


def brief(error: BaseException, most: int = 300) -> str:
    """Return the message of an error as one line of at most `most` characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]} ..."


def plural(count: int, one: str, more: str = "") -> str:
    """Return a count with its noun: 1 track, 2 tracks."""
    return f"{count} {one if count == 1 else more or one + 's'}"
