"""The flags of the commands that take songs, and what is wrong with them."""

import os
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from local.tools.choices import add_method_flags
from local.tools.command_line import UserError, suggest_path
from local.tools.ffmpeg import need_ffmpeg
from local.tools.formats import add_format_flags, find_format_faults
from local.tools.progress import add_progress_flags


def add_song_flags(parser: ArgumentParser, out: str) -> None:
    """Add SONG, --checkpoint, --out and how to separate, with the default of --out."""
    add = parser.add_argument
    add("songs", nargs="*", type=Path, metavar="SONG", help="audio file, or folder of them")
    add(
        "--checkpoint",
        type=os.path.expanduser,
        required=True,
        help="a run's folder, best_model.pth, .ckpt, save_pretrained folder or hub name",
    )
    add("-o", "--out", type=Path, default=out, help="folder to write to [%(default)s]")
    add("--overwrite", action="store_true", help="make again what is in OUT already")
    add_format_flags(parser)
    add("-d", "--device", help="cpu, cuda, cuda:1, ... [cuda where torch finds a GPU, else cpu]")
    add_method_flags(parser)
    add_progress_flags(parser)


def choose_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def find_input_faults(args: Namespace) -> list[str]:
    """Return what is wrong with SONG, --out, --format and ffmpeg, a line each."""
    exists = {song: os.path.isfile(song) or os.path.isdir(song) for song in args.songs}
    gone = [song for song in args.songs if not exists[song]]
    faults = [f"no such file or folder: {song}{suggest_path(song)}" for song in gone]
    if args.out.exists() and not args.out.is_dir():
        faults.append(f"--out: {args.out} is a file; name a folder")
    try:
        need_ffmpeg()
    except UserError as error:
        faults.append(str(error))
    return faults + find_format_faults(args)


def find_device_faults(device: str) -> list[str]:
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        return [f"--device must be cpu, cuda, or cuda: and a number, got {device}"]
    if device == "cpu":
        return []
    if not torch.cuda.is_available():
        return [f"--device {device}: torch finds no GPU; use --device cpu"]
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        return [f"--device {device}: torch finds {torch.cuda.device_count()} GPU(s)"]
    return []
