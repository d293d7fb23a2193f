"""Separate songs into vocals and accompaniment.

`python -m local.separate SONG [SONG ...] --checkpoint CKPT` writes OUT/SONG/vocals.wav and
OUT/SONG/accompaniment.wav for any files that ffmpeg reads, and for all songs in a folder.
`... | python -m local.separate --stream --checkpoint CKPT | ...` separates raw samples as they
come, with a causal model.
"""

import errno
import json
import os
import re
import select
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
import torch
from torch import nn
from tqdm import tqdm

from local.checkpoint import load_model
from local.fast.equal import describe_fast
from local.inference import check_method, separate
from local.musdb18_tracks import TARGETS
from local.streaming import StreamingConvTasNet
from local.tools.choices import FAST, METHODS, OVERLAP, SEGMENT
from local.tools.command_line import (
    CLOSED_PIPE,
    INTERRUPTED,
    OneLineParser,
    UserError,
    clear_errors,
    plural,
    raise_together,
)
from local.tools.ffmpeg import last_line, need_ffmpeg, run_program
from local.tools.files import atomic_path

# What counts as a song in a folder; a file that is named itself may be called anything.
SUFFIXES = frozenset(
    ".aac .ac3 .aif .aifc .aiff .alac .amr .ape .au .caf .flac .m4a .m4b .mka .mkv .mov .mp2 .mp3"
    " .mp4 .mpc .oga .ogg .opus .tta .w64 .wav .webm .wma .wv".split()
)
PIPE_SIZE = 2**16  # bytes


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        raise_together(find_faults(args))
        model = load_separator(args.checkpoint).to(args.device)
        if args.stream:
            status = stream(model, args.stream)
        else:
            check_flags(model, args)
            print(f"through {describe_fast(model, args.fast)}")
            status = 1 if separate_songs(model, args) else 0
    raise SystemExit(status)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m local.separate", description=__doc__)
    add = parser.add_argument
    add("songs", nargs="*", type=Path, metavar="SONG", help="audio file, or folder of them")
    add("--checkpoint", required=True, help="best_model.pth, .ckpt, folder or hub name")
    add("-o", "--out", type=Path, default="separated", help="folder to write to [%(default)s]")
    add("--overwrite", action="store_true", help="separate songs again that are in OUT already")
    add("--float32", action="store_true", help="write 32-bit float wav instead of 16-bit")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("-d", "--device", default=default, help="cpu, cuda, cuda:1, ... [%(default)s]")
    add_method_flags(parser)
    add(
        "--stream",
        nargs="?",
        const="vocals",
        choices=(*TARGETS, "both"),
        help="read raw float32 samples from stdin, channels interleaved, at the model's rate, and"
        " write this, vocals by default, to stdout; both: vocals' channels, then accompaniment's",
    )
    return parser


def add_method_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", choices=METHODS, default=METHODS[0], help="of separation [%(default)s]")
    add("--segment", type=float, default=SEGMENT, help="overlap-add: seconds [%(default)s]")
    add("--overlap", type=float, default=OVERLAP, help="overlap-add: crossfade [%(default)s]")
    add(
        "--fast",
        choices=FAST,
        default=FAST[0],
        help="fast formulas; auto: where they equal the"
        " model; yes: or fail; no: the model itself [%(default)s]",
    )


def find_faults(args: Namespace) -> list[str]:
    """What is wrong with the arguments, a line each."""
    exists = {song: os.path.isfile(song) or os.path.isdir(song) for song in args.songs}
    faults = [f"no such file or folder: {song}" for song in args.songs if not exists[song]]
    if args.stream:
        if args.songs:
            faults.append(f"--stream reads stdin; omit {args.songs[0]}")
        if args.fast == "no":
            faults.append("--stream goes by the fast formulas alone; omit --fast no")
        for name, file in {"stdin": sys.stdin, "stdout": sys.stdout}.items():
            if file is None or file.isatty():
                kind = "closed" if file is None else "a terminal"
                faults.append(f"--stream passes raw samples on, and {name} is {kind}: use pipes")
    else:
        if not args.songs:
            faults.append("name a SONG, or use --stream")
        if args.out.exists() and not args.out.is_dir():
            faults.append(f"--out: {args.out} is a file")
        try:
            need_ffmpeg()
        except UserError as error:
            faults.append(str(error))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        faults.append(f"--device must be cpu, cuda, or cuda: and a number, got {args.device}")
    elif args.device != "cpu" and not torch.cuda.is_available():
        faults.append(f"--device {args.device}: torch sees no GPU; use --device cpu")
    elif (
        args.device != "cpu" and (torch.device(args.device).index or 0) >= torch.cuda.device_count()
    ):
        faults.append(f"--device {args.device}: torch sees {torch.cuda.device_count()} GPU(s)")
    return faults


def load_separator(checkpoint: str | Path) -> nn.Module:
    """A model that has vocals first, and something else after it.

    Raises:
        UserError: the checkpoint holds another model, or none.
    """
    model = load_model(checkpoint)
    if model.C < 2 or model.audio_channels != 2:
        raise UserError(
            f"--checkpoint {checkpoint}: expected a stereo model of vocals and other sources,"
            f" got {model.C} source(s) of {model.audio_channels} channel(s)"
        )
    return model


def check_flags(model: nn.Module, args: Namespace) -> None:
    """Raises a UserError where the model cannot be used as the arguments say."""
    flags = {"overlap-add": "--segment, --overlap"}.get(args.method, "--method")
    for flag, method in {f"--fast {args.fast}": "full", flags: args.method}.items():
        try:
            check_method(model, method, args.segment, args.overlap, args.fast)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from None


def separate_songs(model: nn.Module, args: Namespace) -> dict[Path, str]:
    """Separates all songs into folders of OUT; returns those that failed, and why.

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
    """Which song goes to which folder; songs in a folder keep their place below it."""
    songs, faults = {}, []
    for path in named:
        found = list_songs(path, out) if path.is_dir() else [path]
        if path.is_dir() and path.resolve().is_relative_to(out.resolve()):
            faults.append(f"--out: {path} lies in {out}; name another folder to write to")
        elif not found:
            faults.append(f"{path}: there is no song in it")
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
    """The songs in a folder and below, but for what this command wrote there itself."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.resolve().is_relative_to(out.resolve())
    )
    songs = [path for path in files if path.suffix.lower() in SUFFIXES]
    if len(songs) < len(files):
        others = next(path for path in files if path not in songs)
        print(f"{folder}: {len(files) - len(songs)} other files left aside, {others.name} first")
    return songs


def separate_song(model: nn.Module, song: Path, folder: Path, args: Namespace, title: str) -> None:
    """Writes the estimates of a song, with its length, its rate and its number of channels.

    Raises:
        UserError: the song cannot be read, or only in part, and then that part is separated; or
            the folder cannot be written.
    """
    audio, rate, damage = read_song(song)
    mixture = soxr.resample(audio, rate, model.samplerate, "VHQ")
    stereo = np.broadcast_to(mixture, (len(mixture), 2))
    with progress_bar(title, len(stereo), model.samplerate) as bar:
        sources = separate(
            model,
            torch.from_numpy(stereo.T.copy()),
            args.method,
            args.segment,
            args.overlap,
            bar.update,
            args.fast,
        )
    estimates = {}
    for target, estimate in name_targets(sources).items():
        channels = estimate if audio.shape[1] == 2 else estimate.mean(axis=0, keepdims=True)
        resampled = soxr.resample(channels.T.copy(), model.samplerate, rate, "VHQ")[: len(audio)]
        estimates[target] = np.pad(resampled, ((0, len(audio) - len(resampled)), (0, 0))).T
    try:
        save_estimates(folder, estimates, rate, args.float32)
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written: {error.strerror}") from None
    if damage:
        raise UserError(f"damaged, separated as far as ffmpeg reads it: {damage}")


def read_song(song: Path) -> tuple[np.ndarray, int, str]:
    """(T, 1) or (T, 2) float32 samples, their rate, and what ffmpeg says is wrong with them; more
    channels than two are mixed down.

    Raises:
        UserError: ffmpeg cannot read it, or there is no audio in it.
    """
    source = ["-i", f"file:{song}"]  # with the protocol, a name may hold colons
    entries = ["-show_entries", "stream=sample_rate,channels", "-of", "json"]
    probed = run_program("ffprobe", *source, "-select_streams", "a:0", *entries)
    header = (json.loads(probed.stdout).get("streams") or [{}])[0]
    rate, channels = str(header.get("sample_rate")), min(header.get("channels", 0), 2)
    if not rate.isdecimal() or not int(rate) or not channels:
        raise UserError("there is no audio in it")
    raw = ["-map", "0:a:0", "-ac", str(channels), "-f", "f32le", "-"]
    decoded = run_program("ffmpeg", "-nostdin", *source, *raw)
    audio = np.frombuffer(decoded.stdout, np.float32).reshape(-1, channels)
    if not len(audio):
        raise UserError("there is no audio in it")
    if not np.isfinite(audio).all():
        raise UserError("it holds NaN or infinity")
    return audio, int(rate), last_line(decoded.stderr)


def progress_bar(title: str, time: int, rate: int) -> tqdm:
    """Counts samples, shows seconds."""
    form = "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    return tqdm(desc=f"{title}: ", total=time, unit_scale=1 / rate, bar_format=form)


def name_targets(sources: torch.Tensor) -> dict[str, np.ndarray]:
    """(C, 2, T) -> (2, T) per target; a model of four stems has the accompaniment in parts."""
    return dict(zip(TARGETS, (sources[0].numpy(), sources[1:].sum(0).numpy()), strict=True))


def save_estimates(
    folder: Path, estimates: dict[str, np.ndarray], rate: int, float32: bool
) -> None:
    """Writes (channels, T) estimates as TARGET.wav, and says where 16 bits clipped some samples.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clipped = 0
    with ExitStack() as stack:  # all of them appear together, or none
        for target, estimate in estimates.items():
            samples, subtype = estimate.T, "FLOAT"
            if not float32:
                scaled = np.rint(samples * 32768.0)
                samples, subtype = np.clip(scaled, -32768, 32767).astype(np.int16), "PCM_16"
                clipped += np.count_nonzero(scaled != samples)
            temporary = stack.enter_context(atomic_path(folder / f"{target}.wav"))
            try:
                sf.write(os.fsencode(temporary), samples, rate, subtype, format="WAV")
            except sf.LibsndfileError as error:
                reason = f"{error.error_string.rstrip('.')} (is the disk full?)"
                raise OSError(errno.EIO, reason, str(folder)) from None
    if clipped:
        print(f"{folder}: {plural(clipped, 'sample')} beyond full scale clipped; see --float32")


def stream(model: nn.Module, target: str) -> int:
    """Separates what comes through stdin until it ends or Ctrl-C is pressed; returns the exit
    status.

    Raises:
        UserError: the model cannot be streamed, or the samples are no numbers.
    """
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    rate, channels = model.samplerate, model.audio_channels
    try:
        engine = StreamingConvTasNet(model)
    except ValueError as error:
        raise UserError(f"--stream: {error}") from None
    print(
        f"streaming {target} at {rate} Hz, float32 samples of {channels} channels in,"
        f" {channels * (2 if target == 'both' else 1)} out;"
        f" latency {engine.latency} samples ({1000 * engine.latency / rate:.1f} ms)",
        file=sys.stderr,
    )
    rest, size = b"", 4 * channels
    try:
        with ctrl_c_as_input() as interrupt:
            for chunk in read_chunks(source, interrupt):
                rest += chunk
                whole = len(rest) // size * size
                block = np.frombuffer(rest[:whole], np.float32).reshape(-1, channels)
                rest = rest[whole:]
                write_samples(sink, engine.push(torch.from_numpy(block.T.copy())), target)
            interrupted = is_readable(interrupt)
        write_samples(sink, engine.flush(), target)
    except BrokenPipeError:
        return CLOSED_PIPE
    except OSError as error:
        raise UserError(f"--stream: stdin or stdout: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"stdin: {error}") from None
    if rest:
        print(f"stdin: its last {len(rest)} bytes were no whole sample", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


@contextmanager
def ctrl_c_as_input() -> Iterator[int]:
    """A file descriptor that Ctrl-C makes readable, while it interrupts nothing; a second Ctrl-C
    does again.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, handler))
    signal.set_wakeup_fd(writable)
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, handler)
        os.close(readable)
        os.close(writable)


def read_chunks(source: int, interrupt: int) -> Iterator[bytes]:
    """What is there to read, as it comes, until the source ends or `interrupt` is readable."""
    while True:
        ready, _, _ = select.select([source, interrupt], [], [])
        if interrupt in ready:
            return
        chunk = os.read(source, PIPE_SIZE)
        if not chunk:
            return
        yield chunk


def is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def write_samples(sink: int, sources: torch.Tensor, target: str) -> None:
    """Writes (C, channels, T) estimates as interleaved float32."""
    estimates = name_targets(sources.cpu())
    chosen = np.concatenate([estimates[name] for name in TARGETS if target in (name, "both")])
    samples = memoryview(chosen.T.astype(np.float32).tobytes())
    while samples:
        samples = samples[os.write(sink, samples) :]


if __name__ == "__main__":
    main()
