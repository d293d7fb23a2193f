"""Convert MUSDB18, one .stem.mp4 file per track, to wav files in the layout of MUSDB18-HQ.

`python -m local.stems ROOT OUT` decodes ROOT/{train,valid,test}/TRACK.stem.mp4 to
OUT/{train,valid,test}/TRACK/{mixture,drums,bass,other,vocals}.wav.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.tools.command_line import (
    OneLineParser,
    UserError,
    clear_errors,
    plural,
    raise_together,
)
from local.tools.ffmpeg import need_ffmpeg
from local.tools.files import atomic_path, is_foreign
from local.tools.jobs import run_jobs
from local.tools.progress import add_progress_flags, set_progress

SUFFIX = ".stem.mp4"
SPLITS = ("train", "valid", "validation", "test")
# The audio streams of a file, in their order.
STREAMS = ("mixture", "drums", "bass", "other", "vocals")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.stems", description=__doc__)
    parser.add_argument("root", type=Path, help="folder with train/*.stem.mp4 and test/*.stem.mp4")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tracks at a time")
    add_progress_flags(parser)
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        if args.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {args.jobs}")
        decoded, kept = decode_tree(args.root, args.out, args.jobs)
    print(f"{args.out}: {plural(decoded, 'track')} decoded, {kept} there already")


def stem_files(root: Path, split: str) -> list[Path]:
    """Return the .stem.mp4 files of ROOT/`split`, sorted by name.

    Raises:
        UserError: two of them differ only in the letters of the suffix, as A.stem.MP4 does.
    """
    files = sorted(
        path
        for path in (root / split).glob("*")
        if path.name.casefold().endswith(SUFFIX) and not is_foreign(path)
    )
    tracks, faults = {}, []
    for path in files:
        if (other := tracks.setdefault(track_name(path), path)) != path:
            faults.append(f"{path} and {other.name} would be the same track; remove one")
    raise_together(faults, heading=str(root))
    return files


def track_name(stem_file: Path) -> str:
    return stem_file.name[: -len(SUFFIX)]


def probe_rate(stem_file: Path) -> int | None:
    """Return the sampling rate of a file in Hz; None where ffprobe cannot read it."""
    command = ["ffprobe", "-loglevel", "error", "-select_streams", "a:0"]
    command += ["-show_entries", "stream=sample_rate", "-of", "csv=p=0", stem_file]
    shown = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return int(shown) if shown.isdecimal() else None


def decode_tree(root: Path, out: Path, jobs: int) -> tuple[int, int]:
    """Decode every track that is not in `out` yet.

    Returns:
        (number of tracks decoded, number of tracks there already).

    Raises:
        UserError: ffmpeg is missing; there is nothing to decode; or some tracks failed, which it
            lists after decoding the others.
    """
    need_ffmpeg()
    files = {path: out / split for split in SPLITS for path in stem_files(root, split)}
    if not files:
        raise UserError(f"{root} holds no train/TRACK{SUFFIX} or test/TRACK{SUFFIX}")
    folders = {path: split_folder / track_name(path) for path, split_folder in files.items()}
    missing = {path: folder for path, folder in folders.items() if not folder.exists()}
    _, faults = run_jobs(decode_track, list(missing.items()), jobs, "decoded", "tracks")
    done = plural(len(missing) - len(faults), "track")
    raise_together(faults, heading=f"{done} decoded, {len(faults)} failed")
    return len(missing), len(folders) - len(missing)


def decode_track(
    stem_file: Path, folder: Path, names: Sequence[str] = STREAMS, codec: str = "pcm_s16le"
) -> None:
    """Write the streams of a file as wav. `folder` appears when all are written.

    Args:
        codec: ffmpeg's name of the format of the samples, 16 bit by default.

    Raises:
        UserError: the file cannot be decoded, or the folder cannot be written.
    """
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir(parents=True)
            command = ["ffmpeg", "-nostdin", "-xerror", "-loglevel", "error", "-i", stem_file]
            for name in names:
                stream = f"0:a:{STREAMS.index(name)}"
                command += ["-map", stream, "-c:a", codec, temporary / f"{name}.wav"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                reason = (result.stderr.strip().splitlines() or ["ffmpeg failed"])[-1]
                raise UserError(f"{stem_file}: cannot be decoded: {reason}")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None


if __name__ == "__main__":
    main()
