"""Files: written whole or not at all, locked, hashed, and read as data."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from local.tools.command_line import UserError, brief

LONGEST_NAME = 255 - len("..tmp")  # bytes, of a file or folder that `atomic_path` can write


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A free path beside `path` for a file or a folder: renamed to `path` if the block ends well,
    else removed; what a killed run left there is removed first.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; when it ends, however it ends, the folder is free again.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"{folder} cannot be locked: {brief(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use: another run writes to it") from None
        except OSError:
            pass  # some network file systems know no locks
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_failed_access(error: OSError, *places: Path) -> bool:
    """Whether a disk failed or was full, or what could not be opened lies in one of the places.

    Anything else comes from code that opens files of its own, whose traceback says where.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        return True
    if not isinstance(error.filename, (str, bytes)):
        return False
    path = Path(os.fsdecode(error.filename)).resolve()
    return any(path.is_relative_to(place.resolve()) for place in places)


def read_yaml(path: Path) -> dict:
    """A YAML file that holds a mapping.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections such as convtasnet: and training:")
    return content
