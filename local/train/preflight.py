"""Everything that would stop a run, checked before it starts."""

import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from pytorch_lightning.utilities import rank_zero_only

from local.keys import find_faults
from local.models import count_parameters
from local.musdb18_tracks import (
    TRAINING_SPLITS,
    DatasetError,
    Track,
    find_data_faults,
    find_tracks,
)
from local.tools.choices import SUFFIX
from local.tools.command_line import UserError, raise_together, suggest_path
from local.tools.socket_folder import make_socket_folder
from local.tracks.track import raise_dataset_faults
from local.train.run_folder import find_folder_faults, is_used
from local.train.start import find_base

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
SHOWN = ("torch", "pytorch-lightning", "asteroid", "numpy", "soundfile")
SAMPLE = 0.1  # seconds at the end of every file
PIECE = 60  # seconds to read at a time
READERS = 8  # files at a time; a network drive is faster with many


def check_run(conf: dict, options: dict, make_datasets: Callable[[dict, list[Track]], tuple]):
    """(what `make_datasets` makes of the training tracks, the model of --init as of `find_base`).

    Raises:
        UserError: lists the faults of the configuration, of the files under its root, of --init and
            of EXP.
    """
    exp_dir, data, resume = Path(conf["main_args"]["exp_dir"]), conf["data"], options["resume"]
    faults, base, datasets = [], None, None
    try:
        base = find_base(conf, options)
    except UserError as error:
        faults.append(str(error).replace("\n", "\n  "))
    knows_model = not faults
    faults += find_faults(conf, knows_model)
    is_valid, is_first = not faults, rank_zero_only.rank == 0
    if is_first and resume == "never" and is_used(exp_dir):
        faults.append(
            f"--resume never: {exp_dir} holds a run already; name another --exp_dir, or delete it"
        )
    if resume not in ("auto", "never") and not Path(resume).is_file():
        fault = f"--resume must be auto, never or a last-*.ckpt; no such file: {resume}"
        faults.append(fault + suggest_path(resume))
    if is_first and conf["main_args"]["exp_dir"]:
        parameters = count_parameters(conf) if is_valid else 0
        faults += find_folder_faults(exp_dir, conf["training"], parameters)
    if conf["training"]["num_workers"] > 0:
        try:
            make_socket_folder()
        except UserError as error:
            faults.append(str(error))
    # The files are checked as well where a list of validation tracks is missing.
    has_data = data["suffix"] in SUFFIX and not find_data_faults({**data, "valid_tracks": ""})
    if knows_model and has_data:
        keys = ("sample_rate", "suffix", "stem_names", "missing_stems")
        try:
            tracks = find_tracks(data["root"], TRAINING_SPLITS, *(data[key] for key in keys))
            if is_first:  # the other ranks would read the same
                check_files(tracks, whole=options["check"])
            if is_valid:
                datasets = make_datasets(conf, tracks)
        except DatasetError as error:
            faults.append(str(error).replace("\n", "\n  ") if faults else str(error))
    raise_together(faults)
    return datasets, base


def check_files(tracks: Sequence[Track], whole: bool = False) -> None:
    """Reads the end of every file: the header of a file that is cut short promises the whole.

    Args:
        whole: whether to read all of a flac, whose checksums show what else is damaged.

    Raises:
        DatasetError: lists the files that cannot be read.
    """
    files = [(track, path) for track in tracks for path in track.paths()]
    faults: dict[Path, list[str]] = {}
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(partial(_find_fault, whole), files)
        for (track, _), fault in zip(files, found, strict=True):
            faults.setdefault(track.place.root, []).extend([fault] if fault else [])
    raise_dataset_faults(faults)


def _find_fault(whole: bool, file: tuple[Track, Path]) -> str:
    track, path = file
    is_whole = whole and path.suffix.casefold() == ".flac"
    start = 0 if is_whole else max(track.length - round(SAMPLE * track.rate), 0)
    piece = PIECE * track.rate
    try:
        for begin in range(start, track.length, piece):
            track.read_file(path, begin, min(piece, track.length - begin))
    except DatasetError as error:
        return str(error)
    return ""


def describe_versions() -> str:
    """Of Python and the main libraries; marks those that requirements.txt does not allow."""
    shown = [f"Python {platform.python_version()}"]
    wanted = read_requirements()
    for name in SHOWN:
        installed, limits = version(name), wanted[name].specifier
        is_tested = limits.contains(installed, prereleases=True)
        shown.append(f"{name} {installed}" + ("" if is_tested else f" (tested: {limits})"))
    return ", ".join(shown)


def read_requirements() -> dict[str, Requirement]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}
