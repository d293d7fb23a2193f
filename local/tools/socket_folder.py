"""The folder in which multiprocessing makes the sockets between processes."""

import os
import tempfile
from contextlib import suppress
from multiprocessing import util

from local.tools.command_line import UserError

LONGEST_PATH = 103  # bytes of the path of a socket on macOS; 107 on Linux
IN_FOLDER = len("/pymp-12345678/listener-12345678")
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def make_socket_folder() -> None:
    """Make a folder with a short path for the sockets of this process and of those it starts.

    multiprocessing would make it in TMPDIR, and where its path is too long, a worker cannot pass on
    what it has read, and its reader waits for ever. Like that one, it is removed when this process
    ends.

    Raises:
        UserError: there is no such folder.
    """
    given = tempfile.tempdir
    try:
        for place in _list_places():
            if len(os.fsencode(place)) + IN_FOLDER <= LONGEST_PATH:
                tempfile.tempdir = place
                with suppress(OSError):
                    util.get_temp_dir()  # makes one unless there is one
                    return
    finally:
        tempfile.tempdir = given
    raise UserError(
        "TMPDIR: worker processes need a folder to write to with a path of at most"
        f" {LONGEST_PATH - IN_FOLDER} bytes, and there is none, nor can {', '.join(SHORT_FOLDERS)}"
        " be written; set TMPDIR to one"
    )


def _list_places() -> list[str]:
    try:
        return [tempfile.gettempdir(), *SHORT_FOLDERS]
    except FileNotFoundError:  # no place that tempfile knows can be written
        return list(SHORT_FOLDERS)
