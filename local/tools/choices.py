"""Choices that several commands and functions share, and the flags that offer them."""

from argparse import ArgumentParser
from pathlib import Path

# How a track is separated: see local/inference.py.
METHODS = ("overlap-add", "full", "stream")
SEGMENT = 6.0  # seconds of a segment
OVERLAP = 0.1  # seconds of the crossfade between segments
# Whether to use local/fast: where it equals the model; always, or fail; never.
FAST = ("auto", "yes", "no")
# Of the products when a track is separated; on a GPU bf16 is autocast's.
PRECISIONS = ("float32", "bf16")
# How much of the forward pass the backward pass recomputes: see local/fast/recompute.py.
MEMORY = ("none", "some", "most")
SCORERS = ("bsseval", "museval")
SUFFIXES = ("wav", "flac")  # of the files of a data set
OTHER_SUFFIXES = (".mp3", ".mp4", ".m4a", ".aac", ".ogg", ".opus", ".wma", ".aif", ".aiff")
SUFFIX = ("auto", *SUFFIXES)  # what --suffix may be
AUDIO_FORMATS = ("flac", "opus")  # of the listening page
SPLITS = ("train", "valid", "test")
MISSING_STEMS = ("error", "silent")


def add_data_flags(parser: ArgumentParser) -> None:
    """Add --split, and the flags that name the data set of a run: see eval/flags.py."""
    add = parser.add_argument
    add("--split", choices=SPLITS, default="test", help="the tracks to score [%(default)s]")
    add("--root", type=Path, nargs="+", help="the MUSDB18 or MUSDB18-HQ folders [the run's]")
    add("--suffix", choices=SUFFIX, help="of the files under root [the run's]")
    add("--stem_names", help="files of a stem not named like it, as of train.py [the run's]")
    add("--missing_stems", choices=MISSING_STEMS, help="as of train.py [the run's]")
    add("--valid_tracks", type=Path, help="of --split train and valid, as of train.py [the run's]")


def add_method_flags(parser: ArgumentParser) -> None:
    """Add --method, --segment, --overlap, --fast and --precision."""
    add = parser.add_argument
    add("--method", choices=METHODS, default=METHODS[0], help="how to separate [%(default)s]")
    add("--segment", type=float, default=SEGMENT, help="of overlap-add, in seconds [%(default)s]")
    add("--overlap", type=float, default=OVERLAP, help="of overlap-add, in seconds [%(default)s]")
    add(
        "--fast",
        choices=FAST,
        default=FAST[0],
        help="the fast path of local/fast: auto, where it equals the model; yes, or stop; no, the"
        " model itself [%(default)s]",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of the products: bf16 is faster on GPUs, and CPUs that have it [%(default)s]",
    )


def add_scoring_flags(parser: ArgumentParser) -> None:
    """Add --scorer and --jobs."""
    add = parser.add_argument
    add(
        "--scorer",
        choices=SCORERS,
        default=SCORERS[0],
        help="museval gives the same numbers, slower [%(default)s]",
    )
    add("--jobs", type=int, help="tracks to score at a time [as cores and free memory allow]")
