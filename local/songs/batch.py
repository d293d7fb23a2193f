"""Many songs, each into a folder of OUT: what fails does not end the rest."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from local.needs import describe_failure
from local.songs.find import check_writable, find_songs
from local.tools.command_line import UserError, plural
from local.tools.memory import is_out_of_memory
from local.tools.progress import report


def process_songs(
    args: Namespace, process: Callable[[Path, Path, str], bool], done_word: str
) -> dict[Path, str]:
    """Process all songs that are named, and say how it went.

    Args:
        args: `songs`, `out`, `device`, and the flags of `add_method_flags`.
        process: from a song, the folder that is its, and a title, to whether there was work to do.
        done_word: what was done to a song, such as "separated".

    Returns:
        song, or a folder or link that cannot be read -> its fault; of a song, also where it could
        be processed in part.

    Raises:
        UserError: there is no song, or OUT cannot be written.
    """
    songs, failures = find_songs(args.songs, args.out)
    for path, fault in failures.items():
        report(f"{path}: {fault}", sys.stderr)
    check_writable(args.out)
    on_cpu = "" if args.device == "cpu" else "--device cpu"
    done = {False: 0, True: 0}
    for number, (folder, song) in enumerate(songs.items(), start=1):
        title = f"[{number}/{len(songs)}] {song.name}"
        try:
            is_new = process(song, folder, title)
        except Exception as error:
            failures[song] = describe_failure(error, args, on_cpu)
            report(f"{title}: {failures[song]}", sys.stderr)
            continue
        done[is_new] += 1
        if not is_new:
            report(f"{title}: is in {folder} already; --overwrite makes it again")
    faults = f", {len(failures)} with faults" if failures else ""
    new = plural(done[True], "song")
    report(f"{new} {done_word} to {args.out}, {done[False]} there already{faults}")
    return failures


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise a UserError where files cannot be written in the block."""
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"--out: {folder} cannot be written: {error.strerror}") from None
