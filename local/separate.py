"""Separate songs into vocals and accompaniment.

`python -m local.separate SONG [SONG ...] --checkpoint CKPT` writes OUT/SONG/vocals.wav and
OUT/SONG/accompaniment.wav for any files that ffmpeg reads, and for all songs in a folder. A model
of four stems also gives bass.wav, drums.wav and other.wav.
`... | python -m local.separate --stream --checkpoint CKPT | ...` separates raw samples as they
come, with a causal model.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.musdb18_tracks import SOURCES, TARGETS
from local.songs.flags import (
    add_song_flags,
    choose_device,
    find_device_faults,
    find_input_faults,
)
from local.tools.command_line import (
    OneLineParser,
    cleaning_up_on_sigterm,
    clear_errors,
    raise_together,
)
from local.tools.formats import choose_format
from local.tools.progress import set_progress

if TYPE_CHECKING:
    from torch import nn

LONGEST_BLOCK = 60_000  # ms


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with clear_errors(parser.prog), cleaning_up_on_sigterm():
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        status = run(args)
    raise SystemExit(status)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m local.separate", description=__doc__)
    add = parser.add_argument
    add_song_flags(parser, out="separated")
    add(
        "--stream",
        nargs="?",
        const="vocals",
        choices=(*TARGETS, *SOURCES[1:], "both", "remix"),
        help="read raw float32 samples from stdin, channels interleaved, at the model's rate, and"
        " write this, vocals by default, to stdout; bass, drums, other: by a model of four stems;"
        " both: vocals' channels, then accompaniment's; remix: as local.enhance, with --alpha",
    )
    add("--alpha", type=float, metavar="A", help="of --stream remix, from 0 to 1")
    add("--block", type=float, metavar="MS", help="of --stream [what the pipe holds; remix: 20]")
    return parser


def run(args: Namespace) -> int:
    """Separate songs or stdin, and return the exit status.

    Raises:
        UserError: the flags, the checkpoint or OUT cannot be used.
    """
    from local.estimates import check_method_flags, load_separator
    from local.fast.choose import describe_fast
    from local.raw_stream import separate_stream

    args.device = args.device or choose_device()
    raise_together(find_faults(args))
    model = load_separator(args.checkpoint).to(args.device)
    if args.stream:
        return separate_stream(model, args.stream, args.block, args.precision, args.alpha)
    check_method_flags(model, args)
    print(f"through {describe_fast(model, args.fast)}")
    return 1 if separate_songs(model, args) else 0


def find_faults(args: Namespace) -> list[str]:
    """Return the faults of the flags, a line each."""
    faults = find_stream_faults(args) if args.stream else find_song_faults(args)
    return faults + find_device_faults(args.device)


def find_stream_faults(args: Namespace) -> list[str]:
    faults = []
    if args.songs:
        faults.append(f"--stream reads stdin; omit {args.songs[0]}")
    if args.format or args.float32:
        faults.append("--stream writes raw float32 samples; omit --format and --float32")
    if args.block is not None and not 0 < args.block <= LONGEST_BLOCK:
        faults.append(f"--block must be above 0 and at most {LONGEST_BLOCK} ms, got {args.block}")
    if args.fast == "no":
        faults.append("--stream needs the fast path; omit --fast no")
    if args.stream == "remix" and (args.alpha is None or not 0 <= args.alpha <= 1):
        faults.append(f"--stream remix needs an --alpha from 0 to 1, got {args.alpha}")
    if args.stream != "remix" and args.alpha is not None:
        faults.append("--alpha is for --stream remix; remixes of songs are made by local.enhance")
    for name, file in {"stdin": sys.stdin, "stdout": sys.stdout}.items():
        if file is None or file.isatty():
            kind = "closed" if file is None else "a terminal"
            faults.append(f"--stream reads and writes raw samples, and {name} is {kind}: use pipes")
    return faults


def find_song_faults(args: Namespace) -> list[str]:
    faults = find_input_faults(args)
    if not args.songs:
        faults.append("name a SONG, or use --stream")
    if args.block is not None:
        faults.append("--block needs --stream")
    if args.alpha is not None:
        faults.append("--alpha is for --stream remix; remixes of songs are made by local.enhance")
    return faults


def separate_songs(model: nn.Module, args: Namespace) -> dict[Path, str]:
    """Separate all songs into folders of OUT: see `process_songs`."""
    from local.estimates import describe_settings
    from local.songs.batch import process_songs

    settings = describe_settings(args, model)

    def process(song: Path, folder: Path, title: str) -> bool:
        return separate_song(model, song, folder, args, title, settings)

    return process_songs(args, process, "separated")


def separate_song(
    model: nn.Module, song: Path, folder: Path, args: Namespace, title: str, settings: dict
) -> bool:
    """Write the estimates of a song, with its length, sampling rate and number of channels, and
    what made them: see `songs.record`.

    Args:
        settings: see `estimates.describe_settings`.

    Returns:
        whether they were not there yet.

    Raises:
        UserError: the folder has estimates of another song, or by other settings, or cannot be
            written; memory is too small; or the song cannot be read, or only in part: then that
            part is separated.
    """
    from local.estimates import EstimateWriter, list_targets
    from local.songs.batch import writing_to
    from local.songs.read import SongReader
    from local.songs.record import is_made, plan_record, save_record
    from local.songs.separation import SongSeparation

    targets, form = list_targets(model), choose_format(args)
    record = plan_record(song, settings, form)
    if is_made(folder, targets, record, args.overwrite):
        return False
    reader = SongReader(song)
    separation = SongSeparation(model, reader, args, title)
    with writing_to(folder):
        with EstimateWriter(folder, reader.rate, reader.channels, form, targets) as writer:
            for estimates in separation.read():
                writer.write(estimates)
        save_record(folder, record | {"damage": reader.damage or ""})
    separation.report_end()
    return True


if __name__ == "__main__":
    main()
