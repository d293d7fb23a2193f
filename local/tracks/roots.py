"""The roots of a data set: their splits, the tracks in them, and the names of these."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from local.stems import STREAMS, SUFFIX, stem_files, track_name
from local.tools.choices import SUFFIXES
from local.tools.command_line import suggest_path
from local.tools.files import is_foreign
from local.tracks.track import DatasetError, Place, raise_dataset_faults

# The folders of a split; a root has one of them at most.
SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
# The folders of the challenge's package, down to that with train/.
PACKAGE = ("cadenza_data", "cad2", "task1", "audio", "musdb18hq")
# Control characters, line breaks, and surrogates, which stand for bytes that are not UTF-8.
UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Roots = Path | str | Sequence[Path | str]


def list_roots(roots: Roots) -> list[Path]:
    """The roots that conf.yml or a flag names: one path, or several."""
    return [Path(root) for root in ([roots] if isinstance(roots, (Path, str)) else roots)]


def find_root_faults(roots: Roots) -> list[str]:
    """What is wrong with the roots themselves, a line each."""
    given = [roots] if isinstance(roots, (Path, str)) else roots
    if not given or not all(map(str, given)):
        return ["--root is needed: the MUSDB18-HQ folder, with train/ and test/"]
    roots = list_roots(roots)
    faults = [
        f"--root: no such folder: {root}{suggest_path(root)}"
        for root in roots
        if not os.path.isdir(root)
    ]
    real = [root.resolve() for root in roots]
    again = [root for number, root in enumerate(roots) if root.resolve() in real[:number]]
    return faults + [f"--root: {root} is named twice; name it once" for root in again]


def list_places(roots: Roots, splits: Sequence[str], packed: bool = False) -> list[Place]:
    """The tracks of some splits of all roots, sorted by name.

    Args:
        splits: of which a root may lack some, or all where another root has them.
        packed: also .stem.mp4 files, of splits that hold no folders.

    Raises:
        DatasetError: lists the faults of the roots.
    """
    raise_layout_faults(find_root_faults(roots))
    found, faults = [], []
    for root in list_roots(roots):
        try:
            if not any(find_split(root, split) for split in SPLITS):
                faults.append(_describe_missing(root, splits[0]))
            for split in splits:
                found += _list_split(root, split, packed)
        except DatasetError as error:
            faults.append(str(error))
    raise_layout_faults(faults)
    if not found:
        raise_layout_faults([_describe_missing(root, splits[0]) for root in list_roots(roots)])
    return sorted(name_apart(found), key=lambda place: place.name)


def raise_layout_faults(faults: list[str]) -> None:
    if faults:
        raise DatasetError("\n".join(faults))


def _describe_missing(root: Path, split: str) -> str:
    fault = f"--root: {root} holds no {split}/TRACK/vocals.wav or .flac"
    return f"{fault}; pass the folder that holds train/ and test/"


def find_split(root: Path, split: str) -> Path | None:
    """The folder that holds the tracks of a split; None where the root has no such split.

    In the challenge's package they are in ROOT/train/audio, beside ROOT/train/lyrics, and ROOT may
    be any folder of the package above them.
    """
    home = _find_home(root)
    folders = [home / name for name in SPLITS[split] if os.path.isdir(home / name)]
    if len(folders) > 1:
        both = " and ".join(map(str, folders))
        raise DatasetError(f"--root: {both} are both there; remove or rename one")
    if not folders:
        return None
    (folder,) = folders
    names = {path.name for path in list_folders(folder)}
    is_package = "audio" in names <= {"audio", "lyrics"} and list_folders(folder / "audio")
    return folder / "audio" if is_package else folder


def _find_home(root: Path) -> Path:
    """The folder that holds the splits: the root, or one below it in the challenge's package."""
    names = sum(SPLITS.values(), ())
    below = [root.joinpath(*PACKAGE[start:]) for start in range(len(PACKAGE), -1, -1)]
    homes = (home for home in below if any(os.path.isdir(home / name) for name in names))
    return next(homes, root)


def _list_split(root: Path, split: str, packed: bool) -> list[Place]:
    """The tracks of a split of a root; each has its own name alone."""
    folder = find_split(root, split)
    if folder is None:
        return []
    try:
        broken = [path for path in sorted(folder.iterdir()) if _is_broken_link(path)]
    except OSError as error:
        raise DatasetError(f"--root: {folder} cannot be read: {error.strerror}") from None
    paths = list_folders(folder)
    names = [path.name for path in paths]
    if not paths and not broken:
        paths = stem_files(folder.parent, folder.name)
        names = [track_name(path) for path in paths]
        if not paths:
            raise DatasetError(f"--root: {folder} holds no tracks, TRACK/vocals.wav or .flac")
        if not packed:
            raise DatasetError(
                f"--root: {root} holds {SUFFIX} files; decode them once with"
                f" python -m local.stems {shlex.quote(str(root))} OUT, and use --root OUT"
            )
    faults = [f"{folder.name}/{path.name}: a broken symbolic link" for path in broken]
    raise_dataset_faults({root: faults + find_name_faults(names)})
    return [Place(path, name, name, root, split) for path, name in zip(paths, names, strict=True)]


def list_folders(folder: Path) -> list[Path]:
    """The folders in ROOT/train or ROOT/test that should be tracks, sorted.

    Those that systems have made are none: see `is_foreign`. But a track may have their name.
    """
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.is_dir() and (not is_foreign(path) or _is_named_as_by_a_system(path))
    ]


def _is_named_as_by_a_system(folder: Path) -> bool:
    """Whether a folder holds audio files of a track, and is not hidden."""
    files = {f"{name}.{suffix}" for name in STREAMS for suffix in SUFFIXES}
    return folder.name[0] != "." and any(path.name.casefold() in files for path in folder.glob("*"))


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists() and not is_foreign(path)


def find_name_faults(names: Iterable[str]) -> list[str]:
    """The names of tracks that cannot be printed or written to text files, a line each."""
    return [
        f"{ascii(name)}: rename it; its name holds control characters or is not UTF-8"
        for name in names
        if UNFIT_FOR_NAMES.search(name)
    ]


def name_apart(places: list[Place]) -> list[Place]:
    """The same tracks, where names that several roots have are followed by (ROOTFOLDER).

    Raises:
        DatasetError: another track has such a name already.
    """
    roots: dict[str, set[Path]] = {}
    for place in places:
        roots.setdefault(place.own_name, set()).add(place.root)
    labels = _label({place.root for place in places})
    named = [
        replace(place, name=f"{place.own_name} ({labels[place.root]})")
        if len(roots[place.own_name]) > 1
        else place
        for place in places
    ]
    owners: dict[str, set[Path]] = {}
    for place in named:
        owners.setdefault(place.name, set()).add(place.root)
    equal = [name for name, found in owners.items() if len(found) > 1]
    raise_layout_faults([f"--root: two tracks are called {name}; rename one" for name in equal])
    return named


def _label(roots: Iterable[Path]) -> dict[Path, str]:
    """Root -> the name of its folder, with those above it where another has the same name."""
    parts = {root: Path(os.path.abspath(root)).parts[1:] for root in roots}

    def is_alone(root: Path, depth: int) -> bool:
        return [each[-depth:] for each in parts.values()].count(parts[root][-depth:]) == 1

    depths = {root: next(depth for depth in count(1) if is_alone(root, depth)) for root in parts}
    return {root: "-".join(parts[root][-depth:]) for root, depth in depths.items()}
