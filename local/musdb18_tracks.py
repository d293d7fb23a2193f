"""The tracks of MUSDB18, and of other data sets: found, checked, split.

A data set is a list of roots; a root has splits, and a split tracks: see tracks/roots.py. A track
has four stems, or vocals and a background (a karaoke pair); a stem is a file or a sum of files:
see tracks/stem_files.py.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

from local.tools.command_line import UserError, plural, suggest, suggest_path
from local.tracks.roots import UNFIT_FOR_NAMES, Roots, find_root_faults, list_places
from local.tracks.stem_files import open_tracks, read_rules
from local.tracks.track import SOURCES, TARGETS, DatasetError, Place, Track, shorten_faults

# With what others know by this module.
__all__ = [
    "DEMO_NOTE",
    "SOURCES",
    "TARGETS",
    "TRAINING_SPLITS",
    "UNFIT_FOR_NAMES",
    "VALIDATION_TRACKS",
    "DatasetError",
    "Track",
    "choose_validation",
    "describe_layout",
    "describe_validation",
    "find_data_faults",
    "find_tracks",
    "name_some",
    "split_validation",
]

DEMO_NOTE = ".demo_musdb18.json"  # in the folder of a demo data set: what it was made with
# The list in musdb's configs/mus.yaml. Importing musdb needs ffmpeg, which training does not need.
VALIDATION_TRACKS = (
    "Actions - One Minute Smile",
    "Clara Berry And Wooldog - Waltz For My Victims",
    "Johnny Lokke - Promises & Lies",
    "Patrick Talbot - A Reason To Leave",
    "Triviul - Angelsaint",
    "Alexander Ross - Goodbye Bolero",
    "Fergessen - Nos Palpitants",
    "Leaf - Summerghost",
    "Skelpolu - Human Mistakes",
    "Young Griffo - Pennies",
    "ANiMAL - Rockshow",
    "James May - On The Line",
    "Meaxic - Take A Step",
    "Traffic Experiment - Sirens",
)


MOST_NAMES = 3  # in a line
NAME = attrgetter("name")
TRAINING_SPLITS = ("train", "valid")  # a root without the second has its validation in the first


def find_data_faults(data: dict) -> list[str]:
    """What is wrong with the section data of a configuration, before any track is looked at."""
    faults = find_root_faults(data["root"])
    try:
        read_rules(data["suffix"], data["stem_names"], data["missing_stems"])
    except UserError as error:
        faults.append(str(error))
    if data["valid_tracks"] and not Path(data["valid_tracks"]).is_file():
        faults.append(
            f"--valid_tracks: no such file: {data['valid_tracks']}; pass a file with the name of a"
            f" track per line{suggest_path(data['valid_tracks'])}"
        )
    return faults


def find_tracks(
    roots: Roots,
    split: str | Sequence[str],
    rate: int,
    suffix: str = "auto",
    stem_names: str = "",
    missing_stems: str = "error",
    with_mixture: bool = False,
) -> list[Track]:
    """The tracks of a split of all roots, sorted by name; checks the header of every file.

    Args:
        roots: the folder of MUSDB18-HQ, with train/ and test/, or several such folders.
        split: "train", "valid" or "test", or several of them; a root may lack it if others do not.
        rate: the sampling rate, in Hz, that every file must have.
        suffix: of the files, "wav" or "flac"; "auto" takes what is there.
        stem_names: such as "vocals=lead,backing": the files of a stem, where not its own name.
        missing_stems: "error", or "silent".
        with_mixture: whether to find the mixture, too.

    Raises:
        UserError: no root has the split, or some files are wrong; lists them.
    """
    splits = [split] if isinstance(split, str) else split
    rules = read_rules(suffix, stem_names, missing_stems)
    return open_tracks(list_places(roots, splits), rate, rules, with_mixture)


def split_validation(
    tracks: Sequence[Track], valid_tracks: Path | str | None = None
) -> tuple[list[Track], list[Track]]:
    """Splits the tracks of TRAINING_SPLITS into (training, validation): see `choose_validation`.

    Raises:
        DatasetError: a name in the file is not a track, or one of the two parts is empty.
    """
    by_place = {track.place: track for track in tracks}
    training, validation = choose_validation(list(by_place), valid_tracks)
    if not validation:
        raise DatasetError(
            "--root: train/ holds none of musdb's 14 validation tracks; write the names of some of"
            " its tracks to a file, one per line, and pass --valid_tracks FILE, or move their"
            " folders to valid/ beside train/"
        )
    if not training:
        raise DatasetError(
            "--root: nothing is left to train on: every track of train/ is a validation track"
        )
    return [by_place[place] for place in training], [by_place[place] for place in validation]


def choose_validation(
    places: Sequence[Place], valid_tracks: Path | str | None = None
) -> tuple[list[Place], list[Place]]:
    """Splits what TRAINING_SPLITS hold into (training, validation).

    A root that has valid/ is validated on that, another one on musdb's list. What is a validation
    track in one root is left out of training in all.

    Args:
        valid_tracks: a file with the name of a validation track per line, instead of these. A name
            that several roots have means all of them, or one with its root: "NAME (ROOTFOLDER)".

    Raises:
        DatasetError: a name in the file is not a track.
    """
    in_valid = [place for place in places if place.split == "valid"]
    folders = {place.root for place in in_valid}
    if valid_tracks is None:
        names = {
            place.name
            for place in places
            if place.split == "valid"
            or (place.root not in folders and place.own_name in VALIDATION_TRACKS)
        }
    else:
        names = _read_names(valid_tracks, places)
    # Where train/ and valid/ of a root have a track of one name, it is that of valid/.
    validation = list({place.name: place for place in places if place.name in names}.values())
    kept_apart = {place.own_name for place in (*in_valid, *validation)}
    training = [place for place in places if place.own_name not in kept_apart]
    return training, validation


def _read_names(path: Path | str, places: Sequence[Place]) -> set[str]:
    """The names of the tracks that a file of --valid_tracks lists."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"--valid_tracks: {path} cannot be read: {reason}") from None
    wanted = {line.strip() for line in lines if line.strip()}
    known = {name for place in places for name in (place.name, place.own_name)}
    if unknown := sorted(wanted - known):
        fault = f"--valid_tracks: {path}: not in train/ or valid/:"
        lines = [f"{fault} {name}{suggest(name, known)}" for name in unknown]
        raise DatasetError("\n".join(shorten_faults(lines)))
    return {place.name for place in places if {place.name, place.own_name} & wanted}


def describe_layout(tracks: Sequence[Track]) -> list[str]:
    """What is not as in MUSDB18-HQ, in a line each."""
    pairs = [track for track in tracks if track.is_pair]
    differences = [
        track for track in pairs if any(part.sign < 0 for part in track.stems["accompaniment"])
    ]
    silent = [track for track in tracks if not all(track.stems.values())]
    unused = [f"{track.name}/{file}" for track in silent for file in track.unused]
    summed = [track for track in tracks if "mixture" in track.stems and not track.has_mixture]
    texts = {
        "of vocals and a background": pairs,
        "whose background is the mixture minus the vocals": differences,
        f"with silence for a stem that is missing: {name_some(map(NAME, silent))}": silent,
        "without a mixture: the sum of the stems is taken": summed,
    }
    lines = [f"{plural(len(found), 'track')} {text}" for text, found in texts.items() if found]
    return lines + [f"not used beside them: {name_some(unused)}"] * bool(unused)


def name_some(names: Iterable[str]) -> str:
    """The first names, with dots where there are more."""
    names = list(names)
    return ", ".join(names[:MOST_NAMES]) + " ..." * (len(names) > MOST_NAMES)


def describe_validation(tracks: Sequence[Track], valid_tracks: Path | str | None = None) -> str:
    """Which rule of `choose_validation` chose them, and their names."""
    rules = dict.fromkeys("valid/" if t.place.split == "valid" else "musdb's list" for t in tracks)
    rule = f"--valid_tracks {valid_tracks}" if valid_tracks else " and ".join(rules)
    return f"from {rule}: {name_some(map(NAME, tracks))}"
