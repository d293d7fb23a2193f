"""Files: atomic writes, locks, hashes, YAML, and which are no data."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from local.tools.command_line import UserError, brief, suggest_path

LONGEST_NAME = 255 - len("..tmp")  # bytes, of a file or folder that `atomic_path` can write
# What systems put into any folder, in small letters.
OF_SYSTEMS = {
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("$recycle.bin", "recycler", "system volume information", "found.000"),  # Windows
    *("desktop.ini", "thumbs.db", "ehthumbs.db"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),  # a NAS
    *("lost+found", "~snapshot"),  # disks
}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder.

    Rename it to `path` at the end of the block, or remove it if the block raises. What a killed
    run left at the temporary path is removed first.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder in place of an older one, which is then removed.

    If the block raises, or a run was killed while it put the new one there, the older one stays.
    """
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}.old.tmp")  # one with files cannot be renamed to
    try:
        _settle(old, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder) as temporary:
            yield temporary
            if folder.is_dir():
                os.replace(folder, old)
    finally:
        _settle(old, folder)


def _settle(old: Path, folder: Path) -> None:
    """Put the old folder back where no new one has taken its place, else remove it."""
    if old.is_dir() and not folder.is_dir():
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, until the end of the block or of the process.

    Raises:
        UserError: another process has locked it, or it cannot be written.
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
            pass  # some network file systems have no locks
        yield


def is_foreign(path: Path) -> bool:
    """Tell by its name whether a file or folder is no data of the user.

    Such are those that begin with a dot (.DS_Store, ._vocals.wav, .ipynb_checkpoints, unfinished
    ones: see `atomic_path`), and those that systems put into any folder.
    """
    return path.name.startswith(".") or path.name.casefold() in OF_SYSTEMS


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_absolute(path: Path | str) -> str:
    """An absolute path without .., which a link may have before it."""
    path = Path(path)
    return str(path.resolve() if ".." in path.parts else path.absolute())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def stamp_files(files: Mapping[str, Path]) -> dict[str, list[int]]:
    """Return name -> [bytes, time of the last change in ns]: a changed file has another."""
    stats = {name: file.stat() for name, file in files.items()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def is_failed_access(error: OSError, *places: Path) -> bool:
    """Tell whether a disk is full or failed, or the file of an error is below one of `places`.

    Any other OSError is an error of some library, and its traceback is needed.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        return True
    if not isinstance(error.filename, (str, bytes)):
        return False
    path = Path(os.fsdecode(error.filename)).resolve()
    return any(path.is_relative_to(place.resolve()) for place in places)


def read_yaml(path: Path) -> dict:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fault = f"{path}: cannot be read: {' '.join(str(error).split())}"
        raise UserError(fault + suggest_path(path)) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections such as convtasnet: and training:")
    return content
