"""Convert a data set to stereo wav files of one sampling rate, as training needs them.

`python -m local.convert ROOT OUT` writes the wav and flac files of ROOT/{train,valid,test}/TRACK to
OUT/{train,valid,test}/TRACK: mono is doubled, other rates are resampled. Samples of 16 bits stay 16
bits; others become 32-bit floats.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile as sf

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.songs.find import SUFFIXES as AUDIO
from local.tools.choices import SUFFIXES
from local.tools.command_line import (
    OneLineParser,
    UserError,
    cleaning_up_on_sigterm,
    clear_errors,
    plural,
    raise_together,
)
from local.tools.files import atomic_path, is_foreign
from local.tools.jobs import run_jobs
from local.tools.progress import add_progress_flags, set_progress
from local.tools.resample import resample
from local.tools.sound_files import describe_fault, read_header
from local.tools.wav import BYTES, WavWriter, to_integers
from local.tracks.roots import SPLITS, list_places
from local.tracks.track import Place

BLOCK = 2**18  # samples at a time
SHORT = ("PCM_16", "PCM_S8", "PCM_U8")  # what 16 bits hold


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.convert", description=__doc__)
    add = parser.add_argument
    add("root", type=Path, help="folder with train/TRACK/ and test/TRACK/")
    add("out", type=Path, help="folder to make")
    add("--sample_rate", type=int, default=44100, help="of the files, in Hz [%(default)s]")
    add("--jobs", type=int, default=os.cpu_count(), help="tracks at a time")
    add_progress_flags(parser)
    with clear_errors(parser.prog), cleaning_up_on_sigterm():
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        print(convert_tree(args.root, args.out, args.sample_rate, args.jobs))


@dataclass(frozen=True)
class Source:
    """A file to convert. `length` is in samples at the new rate."""

    path: Path
    rate: int
    channels: int
    samples: int
    subtype: str
    length: int


def convert_tree(root: Path, out: Path, rate: int, jobs: int) -> str:
    """Convert every track that is not in `out` yet; print first how large they will be.

    Returns:
        what was done, in a line.

    Raises:
        UserError: the flags, the files or the place for them are wrong, which is found before
            anything is written; or some tracks failed, which are listed after the others.
    """
    faults = [f"--jobs must be at least 1, got {jobs}"] if jobs < 1 else []
    if rate < 1:
        faults.append(f"--sample_rate must be at least 1, got {rate}")
    if out.resolve() == root.resolve():
        faults.append(f"OUT: {out} is ROOT; name another folder to write to")
    raise_together(faults)
    folders = {place: out / place.split / place.own_name for place in list_places(root, [*SPLITS])}
    there = [folder for folder in folders.values() if folder.exists()]
    missing = {place: folder for place, folder in folders.items() if folder not in there}
    faults = [fault for folder in there for fault in find_rate_faults(folder, rate)]
    plans = {place: plan_track(place, rate, faults) for place in missing}
    raise_together(faults, heading=str(root))
    check_room(out, plans)
    items = [(plans[place], folder, rate) for place, folder in missing.items()]
    try:
        clipped, faults = run_jobs(convert_track, items, jobs, "converted", "tracks")
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; make room, and type the same"
            " command again: what is converted stays"
        ) from None
    done = f"{plural(len(clipped), 'track')} converted"
    raise_together(faults, heading=f"{done}, {len(faults)} failed")
    note = f"; {plural(sum(clipped), 'sample')} beyond full scale clipped" if any(clipped) else ""
    return f"{out}: {done}, {len(there)} there already{note}"


def find_rate_faults(folder: Path, rate: int) -> Iterator[str]:
    """What is wrong with a track in OUT that an earlier call has converted."""
    for path in folder.glob("*.wav"):
        if (found := sf.info(os.fsencode(path)).samplerate) != rate:
            yield f"OUT: {folder} is at {found} Hz, not --sample_rate {rate}; name another folder"
            return


def plan_track(place: Place, rate: int, faults: list[str]) -> dict[str, Source]:
    """The name of a file to write -> its source; what is wrong is appended to `faults`."""
    sources: dict[str, Source] = {}
    for path in sorted(place.path.iterdir()):
        suffix = path.suffix.casefold()
        if is_foreign(path) or suffix not in AUDIO:
            continue
        if suffix.removeprefix(".") not in SUFFIXES:
            faults.append(f"{path}: neither wav nor flac; write it as one, or remove it")
            continue
        try:
            info = read_header(path)
        except ValueError as error:
            faults.append(f"{path}: {error}")
            continue
        name = f"{path.stem}.wav"
        if name in sources:
            faults.append(f"{path}: {sources[name].path.name} is there, too; remove one")
        if info.frames == 0:
            faults.append(f"{path}: no samples")
        if info.channels > 2:
            faults.append(f"{path}: expected 1 or 2 channels, got {info.channels}")
        length = round(info.frames * rate / info.samplerate)
        form = info.samplerate, info.channels, info.frames
        sources[name] = Source(path, *form, choose_subtype(info.subtype), length)
    if not sources:
        faults.append(f"{place.path}: holds no wav or flac; remove it")
    return even_out(sources)


def choose_subtype(subtype: str) -> str:
    return "PCM_16" if subtype in SHORT else "FLOAT"


def even_out(sources: dict[str, Source]) -> dict[str, Source]:
    """The same files; those of other rates may differ by a sample after rounding, which goes."""
    shortest = min((source.length for source in sources.values()), default=0)
    return {
        name: replace(source, length=shortest) if source.length == shortest + 1 else source
        for name, source in sources.items()
    }


def check_room(out: Path, plans: dict[Place, dict[str, Source]]) -> None:
    """Print how large the files will be. Raise a UserError where there is no room for them."""
    sources = [source for plan in plans.values() for source in plan.values()]
    size = sum(source.length * 2 * BYTES[source.subtype] for source in sources)
    parent = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    shown = f"{size / 1e9:.2f} GB in {plural(len(plans), 'track')}"
    if size > free:
        raise UserError(
            f"OUT: {out} would take {shown}, and {free / 1e9:.2f} GB are free; make room, or name"
            " another OUT"
        )
    print(f"{out}: to convert {shown}; {free / 1e9:.1f} GB are free", flush=True)


def convert_track(sources: dict[str, Source], folder: Path, rate: int) -> int:
    """Write the files of a track. `folder` appears when all are written.

    Returns:
        how many samples were clipped.

    Raises:
        UserError: a file cannot be read.
        OSError: a file cannot be written.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        return sum(
            _convert_file(source, temporary / name, rate) for name, source in sources.items()
        )


def _convert_file(source: Source, path: Path, rate: int) -> int:
    done = clipped = 0
    with WavWriter(path, rate, 2, source.subtype) as writer:
        rows = resample(_read_blocks(source), source.rate, rate, source.channels)
        for block in rows:
            block = block[: source.length - done]
            done += len(block)
            clipped += _write(writer, block, source.subtype)
        _write(writer, np.zeros((source.length - done, 1), np.float32), source.subtype)
    return clipped


def _read_blocks(source: Source) -> Iterator[np.ndarray]:
    samples = 0
    try:
        with sf.SoundFile(os.fsencode(source.path)) as file:
            for block in file.blocks(BLOCK, dtype="float32", always_2d=True):
                samples += len(block)
                yield block
    except sf.LibsndfileError:
        raise UserError(f"{source.path}: {describe_fault(source.path)}") from None
    if samples != source.samples:
        raise UserError(f"{source.path}: damaged after {samples} samples; copy it again")


def _write(writer: WavWriter, block: np.ndarray, subtype: str) -> int:
    """Write (T, 1 or 2) as stereo; return how many samples were clipped."""
    block = np.broadcast_to(block, (len(block), 2))
    if subtype == "FLOAT":
        writer.write(np.ascontiguousarray(block))
        return 0
    samples, clipped = to_integers(block, 16)
    writer.write(samples)
    return clipped


if __name__ == "__main__":
    main()
