"""Lift the lyrics of songs: separate them, and mix vocals and accompaniment anew.

`python -m local.enhance SONG [SONG ...] --checkpoint CKPT --alpha A [A ...]` writes
OUT/SONG/remix.wav for any files that ffmpeg reads, and for all songs in a folder; of several
alphas OUT/SONG/remix_A.wav each.
`python -m local.enhance --scenes METADATA --music AUDIO --checkpoint CKPT --out DIR` writes what
the Second Cadenza Challenge asks for, DIR/enhanced_signals/SCENE_LISTENER_AALPHA_remix.flac.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.lift.flags import add_remix_flags, find_faults
from local.songs.flags import add_song_flags, choose_device
from local.tools.command_line import (
    OneLineParser,
    cleaning_up_on_sigterm,
    clear_errors,
    raise_together,
)
from local.tools.progress import set_progress

if TYPE_CHECKING:
    from torch import nn

    from local.lift.listener import Listener


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with clear_errors(parser.prog), cleaning_up_on_sigterm():
        args = parser.parse_args(argv)
        args.typed = parser.list_typed(argv)
        set_progress(args.quiet, args.progress)
        status = run(args)
    raise SystemExit(status)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m local.enhance", description=__doc__)
    add_song_flags(parser, out="enhanced")
    add_remix_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Enhance songs or scenes, and return the exit status.

    Raises:
        UserError: the flags, the checkpoint, the metadata or OUT cannot be used.
    """
    from local.estimates import check_method_flags, load_separator
    from local.fast.choose import describe_fast

    args.device = args.device or choose_device()
    raise_together(find_faults(args))
    prepare = prepare_scenes if args.scenes else prepare_songs
    enhance = prepare(args)
    model = load_separator(args.checkpoint).to(args.device)
    check_method_flags(model, args)
    print(f"through {describe_fast(model, args.fast)}")
    return 1 if enhance(model, args) else 0


def prepare_songs(args: Namespace) -> Callable:
    """Return a function that enhances the songs, of the model and `args`."""
    from local.lift.listener import LUFS, load_listener

    if not args.listener:
        return enhance_songs
    if args.lufs is None:
        args.lufs = LUFS
    return partial(enhance_songs, listener=load_listener(args.metadata, args.listener))


def prepare_scenes(args: Namespace) -> Callable:
    """As `prepare_songs`, of the scenes."""
    from local.lift.package import read_pairs

    pairs = read_pairs(args.scenes, args.music, args.split)
    if args.part:
        number, jobs = args.part
        pairs = dict(list(pairs.items())[number - 1 :: jobs])
    return partial(enhance_scenes_of, pairs)


def enhance_songs(
    model: nn.Module, args: Namespace, listener: Listener | None = None
) -> dict[Path, str]:
    """Enhance all songs into folders of OUT: see `process_songs`."""
    from local.estimates import describe_settings
    from local.lift.song import enhance_song
    from local.songs.batch import process_songs

    args.alpha = list(dict.fromkeys(args.alpha))
    settings = describe_settings(args, model) | describe_remix(args, listener)

    def process(song: Path, folder: Path, title: str) -> bool:
        return enhance_song(model, song, folder, args, title, settings, listener)

    return process_songs(args, process, "enhanced")


def enhance_scenes_of(pairs: dict, model: nn.Module, args: Namespace) -> int:
    """Enhance the scenes of `package.read_pairs`: see `scenes.enhance_scenes`."""
    from local.estimates import describe_settings
    from local.lift.scenes import enhance_scenes

    return enhance_scenes(model, pairs, args, describe_settings(args, model))


def describe_remix(args: Namespace, listener: Listener | None) -> dict:
    """Return what remixes depend on beside the estimates; the names of several tell the alpha."""
    return {
        "alpha": args.alpha[0] if len(args.alpha) == 1 else "in the names",
        "consistent": args.consistent,
        "lufs": args.lufs,
        "clip": args.clip,
        "listener": [list(map(list, ear)) for ear in listener] if listener else None,
    }


if __name__ == "__main__":
    main()
