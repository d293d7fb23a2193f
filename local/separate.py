"""Separate songs into vocals and accompaniment.

`python -m local.separate SONG [SONG ...] --checkpoint CKPT` writes OUT/SONG/vocals.wav and
OUT/SONG/accompaniment.wav for any files that ffmpeg reads, and for all songs in a folder. A model
of four stems also gives bass.wav, drums.wav and other.wav.
`... | python -m local.separate --stream --checkpoint CKPT | ...` separates raw samples as they
come, with a causal model.
"""

from __future__ import annotations

import math
import os
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.musdb18_tracks import SOURCES, TARGETS
from local.tools.choices import add_method_flags
from local.tools.command_line import (
    OneLineParser,
    UserError,
    cleaning_up_on_sigterm,
    clear_errors,
    plural,
    raise_together,
    suggest_path,
)
from local.tools.ffmpeg import need_ffmpeg
from local.tools.formats import FORMATS, add_format_flags, choose_format, find_format_faults
from local.tools.memory import free_memory, is_out_of_memory
from local.tools.progress import add_progress_flags, report, set_progress

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
    add("songs", nargs="*", type=Path, metavar="SONG", help="audio file, or folder of them")
    add(
        "--checkpoint",
        type=os.path.expanduser,
        required=True,
        help="a run's folder, best_model.pth, .ckpt, save_pretrained folder or hub name",
    )
    add("-o", "--out", type=Path, default="separated", help="folder to write to [%(default)s]")
    add("--overwrite", action="store_true", help="separate songs again that are in OUT already")
    add_format_flags(parser)
    add("-d", "--device", help="cpu, cuda, cuda:1, ... [cuda where torch finds a GPU, else cpu]")
    add_method_flags(parser)
    add_progress_flags(parser)
    add(
        "--stream",
        nargs="?",
        const="vocals",
        choices=(*TARGETS, *SOURCES[1:], "both"),
        help="read raw float32 samples from stdin, channels interleaved, at the model's rate, and"
        " write this, vocals by default, to stdout; bass, drums, other: by a model of four stems;"
        " both: vocals' channels, then accompaniment's",
    )
    add("--block", type=float, metavar="MS", help="of --stream, in ms [what the pipe holds]")
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
        return separate_stream(model, args.stream, args.block, args.precision)
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
    if args.format:
        faults.append(f"--stream writes raw float32 samples; omit --format {args.format}")
    if args.block is not None and not 0 < args.block <= LONGEST_BLOCK:
        faults.append(f"--block must be above 0 and at most {LONGEST_BLOCK} ms, got {args.block}")
    if args.fast == "no":
        faults.append("--stream needs the fast path; omit --fast no")
    for name, file in {"stdin": sys.stdin, "stdout": sys.stdout}.items():
        if file is None or file.isatty():
            kind = "closed" if file is None else "a terminal"
            faults.append(f"--stream reads and writes raw samples, and {name} is {kind}: use pipes")
    return faults


def find_song_faults(args: Namespace) -> list[str]:
    exists = {song: os.path.isfile(song) or os.path.isdir(song) for song in args.songs}
    gone = [song for song in args.songs if not exists[song]]
    faults = [f"no such file or folder: {song}{suggest_path(song)}" for song in gone]
    if not args.songs:
        faults.append("name a SONG, or use --stream")
    if args.block is not None:
        faults.append("--block needs --stream")
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


def separate_songs(model: nn.Module, args: Namespace) -> dict[Path, str]:
    """Separate all songs into folders of OUT.

    Returns:
        song, or a folder or link that cannot be read -> its fault; of a song, also where it could
        be separated in part.

    Raises:
        UserError: there is no song, or OUT cannot be written.
    """
    from local.estimates import describe_settings
    from local.needs import describe_failure
    from local.songs.find import check_writable, find_songs

    songs, failures = find_songs(args.songs, args.out)
    for path, fault in failures.items():
        report(f"{path}: {fault}", sys.stderr)
    check_writable(args.out)
    settings = describe_settings(args, model)
    on_cpu = "" if args.device == "cpu" else "--device cpu"
    done = {False: 0, True: 0}
    for number, (folder, song) in enumerate(songs.items(), start=1):
        title = f"[{number}/{len(songs)}] {song.name}"
        try:
            done[separate_missing(model, song, folder, args, title, settings)] += 1
        except Exception as error:
            failures[song] = describe_failure(error, args, on_cpu)
            report(f"{title}: {failures[song]}", sys.stderr)
    faults = f", {len(failures)} with faults" if failures else ""
    separated = plural(done[True], "song")
    report(f"{separated} separated to {args.out}, {done[False]} there already{faults}")
    return failures


def separate_missing(
    model: nn.Module, song: Path, folder: Path, args: Namespace, title: str, settings: dict
) -> bool:
    """Separate a song whose estimates are not there yet, and return whether they were not.

    Args:
        settings: see `estimates.describe_settings`.

    Raises:
        UserError: the folder has estimates of another song, or by other settings; or see
            `separate_song`.
    """
    from local.estimates import list_targets
    from local.songs.record import find_fault, plan_record

    form = choose_format(args)
    record, suffix = plan_record(song, settings, form), FORMATS[form].suffix
    is_there = all((folder / f"{name}.{suffix}").is_file() for name in list_targets(model))
    if args.overwrite or not is_there:
        separate_song(model, song, folder, args, title, record)
        return True
    if fault := find_fault(folder, record):
        advice = "--overwrite separates it again, --out writes elsewhere"
        raise UserError(f"{folder} holds {fault}; {advice}")
    report(f"{title}: is in {folder} already; --overwrite separates it again")
    return False


def separate_song(
    model: nn.Module, song: Path, folder: Path, args: Namespace, title: str, record: dict
) -> None:
    """Write the estimates of a song, with its length, sampling rate and number of channels, and
    what made them: see `songs.record`.

    Raises:
        UserError: the folder cannot be written, memory is too small, or the song cannot be read, or
            only in part; the part that can be read is separated.
    """
    import torch

    from local.estimates import EstimateWriter, list_settings, list_targets, progress_bar
    from local.inference import separate_blocks
    from local.songs.convert import read_mixture, restore
    from local.songs.read import SongReader
    from local.songs.record import save_record

    reader, rate, targets = SongReader(song), model.samplerate, list_targets(model)
    mixture = read_mixture(reader, rate)
    seconds = reader.expected / reader.rate if reader.expected else math.inf
    if args.method == "full":
        mixture = [torch.cat(list(mixture), dim=-1)]
        seconds = mixture[0].shape[-1] / rate
    memory = check_memory(model, seconds, args)
    if args.method == "full":
        report(f"{title}: {memory}")
    samples = reader.expected and round(reader.expected * rate / reader.rate)
    form = reader.rate, reader.channels, choose_format(args)
    try:
        with (
            progress_bar(title, samples, rate) as bar,
            EstimateWriter(folder, *form, targets) as writer,
        ):
            blocks = separate_blocks(model, mixture, *list_settings(args, bar.update))
            for estimates in restore(blocks, targets, rate, reader):
                writer.write(estimates)
        save_record(folder, record | {"damage": reader.damage or ""})
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"--out: {folder} cannot be written: {error.strerror}") from None
    if reader.note:
        report(f"{title}: {reader.note}")
    if reader.damage:
        raise UserError(f"damaged; separated what ffmpeg could read: {reader.damage}")


def check_memory(model: nn.Module, seconds: float, args: Namespace) -> str:
    """Return what memory the separation of a song needs, and finds.

    Raises:
        UserError: that is too little.
    """
    from local.needs import advise_on_memory, separation_bytes

    in_blocks = args.method != "full"
    needed, free = separation_bytes(model, seconds, args, in_blocks), free_memory()
    memory = f"about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB free"
    if needed > free:
        raise UserError(f"--method {args.method} needs {memory}{advise_on_memory(args)}")
    return f"--method {args.method} needs {memory}"


if __name__ == "__main__":
    main()
