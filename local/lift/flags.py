"""The flags of local.enhance, and what is wrong with them."""

import argparse
import re
from argparse import Namespace
from pathlib import Path

from local.songs.flags import find_device_faults, find_input_faults

QUIETEST = -70.0  # LUFS
OF_SONGS = (
    "songs alpha consistent lufs clip save_estimates format float32 listener metadata".split()
)
OF_SCENES = ("music", "split", "part")


def add_remix_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is done with the estimates."""
    add = parser.add_argument
    add(
        "--alpha",
        type=float,
        nargs="+",
        metavar="A",
        help="how far the vocals are lifted, from 0 (vocals and accompaniment as they are) to 1"
        " (the vocals alone, doubled); a remix for each",
    )
    add(
        "--consistent",
        action="store_true",
        help="take mixture minus vocals for the accompaniment, not the model's estimate",
    )
    add(
        "--lufs",
        type=float,
        metavar="L",
        help="bring the song to this loudness first, and leave the remix as it comes [the remix is"
        " brought to the loudness of the song; with --listener: -40, first]",
    )
    add("--clip", action="store_true", help="clip beyond full scale, instead of turning down")
    add("--save_estimates", action="store_true", help="write vocals and accompaniment, too")
    add("--listener", metavar="ID", help="compress for this listener's hearing, with --metadata")
    add("--metadata", type=Path, metavar="FOLDER", help="the challenge's, of --listener")
    add("--scenes", type=Path, metavar="METADATA", help="do the challenge's own run of all scenes")
    add("--music", type=Path, metavar="AUDIO", help="of --scenes: the challenge's folder of songs")
    add("--split", choices=["train", "valid"], default="valid", help="of --scenes [%(default)s]")
    add("--part", type=read_part, metavar="K/N", help="of --scenes: one of N jobs that share them")


def read_part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"expected K/N, K from 1 to N, such as 2/8, got {text}")
    return int(found[1]), int(found[2])


def find_faults(args: Namespace) -> list[str]:
    """Return the faults of the flags, a line each."""
    faults = find_input_faults(args) + find_device_faults(args.device)
    return faults + (find_scene_faults(args) if args.scenes else find_remix_faults(args))


def find_scene_faults(args: Namespace) -> list[str]:
    from local.lift.listener import find_compressor_fault

    faults = [f"--scenes: no such folder: {args.scenes}"] if not args.scenes.is_dir() else []
    if not args.music:
        faults.append("--scenes needs --music, the folder with the challenge's songs")
    elif not args.music.is_dir():
        faults.append(f"--music: no such folder: {args.music}")
    others = [name for name in args.typed if name in OF_SONGS]
    if others:
        named = ", ".join("SONG" if name == "songs" else f"--{name}" for name in others)
        faults.append(f"--scenes does what its metadata say; omit {named}")
    if fault := find_compressor_fault():
        faults.append(f"--scenes: {fault}")
    return faults


def find_remix_faults(args: Namespace) -> list[str]:
    faults = [f"--{name} is for --scenes" for name in args.typed if name in OF_SCENES]
    if not args.songs:
        faults.append("name a SONG, or use --scenes")
    if not args.alpha:
        faults.append("name an --alpha from 0 to 1, or several")
    faults += [f"--alpha must be from 0 to 1, got {a}" for a in args.alpha or () if not 0 <= a <= 1]
    if args.lufs is not None and not QUIETEST <= args.lufs <= 0:
        faults.append(f"--lufs must be from {QUIETEST} to 0, got {args.lufs}")
    return faults + find_listener_faults(args)


def find_listener_faults(args: Namespace) -> list[str]:
    from local.lift.listener import find_compressor_fault

    if not args.listener:
        return ["--metadata needs --listener"] if args.metadata else []
    faults = []
    if not args.metadata:
        faults.append("--listener needs --metadata, the folder of the challenge's metadata")
    elif not args.metadata.is_dir():
        faults.append(f"--metadata: no such folder: {args.metadata}")
    if fault := find_compressor_fault():
        faults.append(f"--listener: {fault}")
    return faults
