"""Find the songs in folders, and the folder that each is separated to."""

import os
from pathlib import Path

from local.tools.command_line import UserError, plural, raise_together
from local.tools.files import is_foreign

# Files of these suffixes in a folder are songs; a file that is named itself may have any other.
SUFFIXES = frozenset(
    ".aac .ac3 .aif .aifc .aiff .alac .amr .ape .au .caf .flac .m4a .m4b .mka .mkv .mov .mp2 .mp3"
    " .mp4 .mpc .oga .ogg .opus .tta .w64 .wav .webm .wma .wv".split()
)


def find_songs(named: list[Path], out: Path) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Find the songs that are named, and those in folders that are.

    Songs in a folder keep their place below it. Of two songs with one name, the second keeps its
    suffix in the name of its folder, or gets a number. What is ignored is printed.

    Returns:
        (folder of OUT -> song, path -> why it cannot be read).

    Raises:
        UserError: there is no song, or OUT holds one.
    """
    songs, faults, unreadable = {}, [], {}
    for path in named:
        found = [path]
        if path.is_dir():
            if path.resolve().is_relative_to(out.resolve()):
                faults.append(f"--out: {path} lies in {out}; name another folder to write to")
            found, broken = list_songs(path, out)
            unreadable |= broken
            if not found and not broken:
                faults.append(f"{path}: holds no song")
        for song in found:
            below = song.parent.relative_to(path) if path.is_dir() else Path()
            folder = _name_apart(out / below, song, songs)
            if folder not in songs and folder.name != _name(song):
                print(f"{song}: goes to {folder}, as {_name(song)} is the name of another song")
            songs[folder] = song
    raise_together(faults)
    return songs, unreadable


def _name(song: Path) -> str:
    is_suffixed = song.suffix.lower() in SUFFIXES and song.stem not in (".", "..")
    return song.stem if is_suffixed else song.name


def _name_apart(parent: Path, song: Path, songs: dict[Path, Path]) -> Path:
    """Return a folder below `parent` that no other song has."""
    names = [_name(song), song.name]
    names += [f"{_name(song)} ({number})" for number in range(2, len(songs) + 3)]
    folders = [parent / name for name in names]
    return next(folder for folder in folders if songs.get(folder, song) == song)


def list_songs(folder: Path, out: Path) -> tuple[list[Path], dict[Path, str]]:
    """List the songs in a folder and below it, except those in OUT. Linked folders are followed.

    Returns:
        (songs, path -> why it cannot be read).
    """
    songs, others, unreadable, visited = [], [], {}, {}  # folder without links -> where it was met

    def note_error(error: OSError) -> None:
        unreadable[Path(error.filename)] = f"cannot be read: {error.strerror}"

    for place, folders, files in os.walk(folder, onerror=note_error, followlinks=True):
        here = Path(place)
        target = here.resolve()
        if target in visited:
            print(f"{here}: is the same folder as {visited[target]}; ignored")
        if target in visited or target.is_relative_to(out.resolve()):
            folders.clear()
            continue
        visited[target] = here
        folders[:] = [name for name in folders if not is_foreign(here / name)]
        folders.sort(key=lambda name: ((here / name).is_symlink(), name))
        for path in sorted(here / name for name in files):
            if is_foreign(path):
                continue
            if path.is_symlink() and not os.path.exists(path):
                unreadable[path] = "is a link to something that is not there"
            elif path.suffix.lower() in SUFFIXES:
                songs.append(path)
            else:
                others.append(path)
    if others:
        print(f"{folder}: {plural(len(others), 'other file')} ignored, first {others[0].name}")
    return sorted(songs), unreadable


def check_writable(out: Path) -> None:
    """Raise a UserError where nothing can be written to OUT; make it where it is not there."""
    probe = out / ".writable.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None
