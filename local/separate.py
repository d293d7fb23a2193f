"""Separate songs into vocals and accompaniment.

`python -m local.separate SONG [SONG ...] --checkpoint CKPT` writes OUT/SONG/vocals.wav and
OUT/SONG/accompaniment.wav for any files that ffmpeg reads, and for all songs in a folder.
`... | python -m local.separate --stream --checkpoint CKPT | ...` separates raw samples as they
come, with a causal model.
"""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.musdb18_tracks import TARGETS
from local.tools.choices import add_method_flags
from local.tools.command_line import (
    OneLineParser,
    UserError,
    clear_errors,
    plural,
    raise_together,
)
from local.tools.ffmpeg import last_line, need_ffmpeg, run_program
from local.tools.progress import add_progress_flags, set_progress

if TYPE_CHECKING:
    from torch import nn

# Files of these suffixes in a folder are songs; a file that is named itself may have any other.
SUFFIXES = frozenset(
    ".aac .ac3 .aif .aifc .aiff .alac .amr .ape .au .caf .flac .m4a .m4b .mka .mkv .mov .mp2 .mp3"
    " .mp4 .mpc .oga .ogg .opus .tta .w64 .wav .webm .wma .wv".split()
)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        status = run(args)
    raise SystemExit(status)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m local.separate", description=__doc__)
    add = parser.add_argument
    add("songs", nargs="*", type=Path, metavar="SONG", help="audio file, or folder of them")
    add(
        "--checkpoint",
        type=os.path.expanduser,
        required=True,
        help="a run's folder, best_model.pth, .ckpt, save_pretrained folder or hub name",
    )
    add("-o", "--out", type=Path, default="separated", help="folder to write to [%(default)s]")
    add("--overwrite", action="store_true", help="separate songs again that are in OUT already")
    add("--float32", action="store_true", help="write 32-bit float wav instead of 16-bit")
    add("-d", "--device", help="cpu, cuda, cuda:1, ... [cuda where torch finds a GPU, else cpu]")
    add_method_flags(parser)
    add_progress_flags(parser)
    add(
        "--stream",
        nargs="?",
        const="vocals",
        choices=(*TARGETS, "both"),
        help="read raw float32 samples from stdin, channels interleaved, at the model's rate, and"
        " write this, vocals by default, to stdout; both: vocals' channels, then accompaniment's",
    )
    return parser


def run(args: Namespace) -> int:
    """Separate songs or stdin, and return the exit status.

    Raises:
        UserError: the flags, the checkpoint or OUT cannot be used.
    """
    import torch

    from local.estimates import check_method_flags, load_separator
    from local.fast.choose import describe_fast
    from local.raw_stream import separate_stream

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    raise_together(find_faults(args))
    model = load_separator(args.checkpoint).to(args.device)
    if args.stream:
        return separate_stream(model, args.stream)
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
    if args.fast == "no":
        faults.append("--stream needs the fast path; omit --fast no")
    for name, file in {"stdin": sys.stdin, "stdout": sys.stdout}.items():
        if file is None or file.isatty():
            kind = "closed" if file is None else "a terminal"
            faults.append(f"--stream reads and writes raw samples, and {name} is {kind}: use pipes")
    return faults


def find_song_faults(args: Namespace) -> list[str]:
    exists = {song: os.path.isfile(song) or os.path.isdir(song) for song in args.songs}
    faults = [f"no such file or folder: {song}" for song in args.songs if not exists[song]]
    if not args.songs:
        faults.append("name a SONG, or use --stream")
    if args.out.exists() and not args.out.is_dir():
        faults.append(f"--out: {args.out} is a file; name a folder")
    try:
        need_ffmpeg()
    except UserError as error:
        faults.append(str(error))
    return faults


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


def separate_songs(model: nn.Module, args: Namespace) -> dict[Path, str]:
    """Separate all songs into folders of OUT.

    Returns:
        song -> its fault, of those that could not be separated, or only in part.

    Raises:
        UserError: two songs would go to the same folder, there is none, or OUT cannot be written.
    """
    songs = find_songs(args.songs, args.out)
    failures, kept = {}, 0
    for number, (folder, song) in enumerate(songs.items(), start=1):
        title = f"[{number}/{len(songs)}] {song.name}"
        if not args.overwrite and all((folder / f"{name}.wav").is_file() for name in TARGETS):
            print(f"{title}: is in {folder} already; --overwrite separates it again")
            kept += 1
            continue
        try:
            separate_song(model, song, folder, args, title)
        except UserError as error:
            failures[song] = str(error)
            print(f"{title}: {error}", file=sys.stderr)
    done = len(songs) - kept - len(failures)
    faults = f", {len(failures)} with faults" if failures else ""
    print(f"{plural(done, 'song')} separated to {args.out}, {kept} there already{faults}")
    return failures


def find_songs(named: list[Path], out: Path) -> dict[Path, Path]:
    """Return folder of OUT -> song. Songs in a folder keep their place below it.

    Raises:
        UserError: two songs would go to the same folder, or there is none.
    """
    songs, faults = {}, []
    for path in named:
        found = list_songs(path, out) if path.is_dir() else [path]
        if path.is_dir() and path.resolve().is_relative_to(out.resolve()):
            faults.append(f"--out: {path} lies in {out}; name another folder to write to")
        elif not found:
            faults.append(f"{path}: holds no song")
        for song in found:
            below = song.parent.relative_to(path) if path.is_dir() else Path()
            is_suffixed = song.suffix.lower() in SUFFIXES and song.stem not in (".", "..")
            name = song.stem if is_suffixed else song.name
            other = songs.setdefault(out / below / name, song)
            if other != song:
                faults.append(f"{song} and {other} would both go to {out / below / name}")
    raise_together(faults, heading="the songs")
    return songs


def list_songs(folder: Path, out: Path) -> list[Path]:
    """Return the songs in a folder and below it, except those in OUT."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.resolve().is_relative_to(out.resolve())
    )
    songs = [path for path in files if path.suffix.lower() in SUFFIXES]
    if len(songs) < len(files):
        others = [path for path in files if path not in songs]
        print(f"{folder}: {plural(len(others), 'other file')} ignored, first {others[0].name}")
    return songs


def separate_song(model: nn.Module, song: Path, folder: Path, args: Namespace, title: str) -> None:
    """Write the estimates of a song, with its length, sampling rate and number of channels.

    Raises:
        UserError: the folder cannot be written, or the song cannot be read, or only in part; the
            part that can be read is separated.
    """
    import soxr
    import torch

    from local.estimates import save_estimates, separate_targets

    audio, rate, damage = read_song(song)
    mixture = soxr.resample(audio, rate, model.samplerate, "VHQ")
    stereo = np.broadcast_to(mixture, (len(mixture), 2))
    estimates = {}
    separated = separate_targets(model, torch.from_numpy(stereo.T.copy()), args, title)
    for target, estimate in separated.items():
        channels = estimate if audio.shape[1] == 2 else estimate.mean(axis=0, keepdims=True)
        resampled = soxr.resample(channels.T.copy(), model.samplerate, rate, "VHQ")[: len(audio)]
        estimates[target] = np.pad(resampled, ((0, len(audio) - len(resampled)), (0, 0))).T
    try:
        save_estimates(folder, estimates, rate, args.float32)
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written: {error.strerror}") from None
    if damage:
        raise UserError(f"damaged; separated what ffmpeg could read: {damage}")


def read_song(song: Path) -> tuple[np.ndarray, int, str]:
    """Read a song with ffmpeg, and mix more than two channels down to two.

    Returns:
        ((T, 1) or (T, 2) float32 samples, sampling rate, ffmpeg's last error or "").

    Raises:
        UserError: ffmpeg cannot read it, or it holds no audio, NaN or infinity.
    """
    source = ["-i", f"file:{song}"]  # with the protocol, a name may hold colons
    entries = ["-show_entries", "stream=sample_rate,channels", "-of", "json"]
    probed = run_program("ffprobe", *source, "-select_streams", "a:0", *entries)
    header = (json.loads(probed.stdout).get("streams") or [{}])[0]
    rate, channels = str(header.get("sample_rate")), min(header.get("channels", 0), 2)
    if not rate.isdecimal() or not int(rate) or not channels:
        raise UserError("holds no audio")
    raw = ["-map", "0:a:0", "-ac", str(channels), "-f", "f32le", "-"]
    decoded = run_program("ffmpeg", "-nostdin", *source, *raw)
    audio = np.frombuffer(decoded.stdout, np.float32).reshape(-1, channels)
    if not len(audio):
        raise UserError("holds no audio")
    if not np.isfinite(audio).all():
        raise UserError("holds NaN or infinity")
    return audio, int(rate), last_line(decoded.stderr)


if __name__ == "__main__":
    main()
