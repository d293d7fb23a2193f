"""A small data set in the layout of MUSDB18-HQ, synthesised on the spot.

`python -m local.demo_musdb18 OUT` makes OUT/train/TRACK/{mixture,vocals,drums,bass,other}.wav and
OUT/test/... likewise.

MUSDB18 cannot be shipped; these songs stand in for it. A voice with formants, drums,
bass and chords share tempo and key within a song. Melodies, rhythms, timbres, panning and reverb
differ from song to song, so that what a small ConvTasNet learns holds for songs that it was not
trained on. One real recording, the excerpt in the stempeg package, joins the test split. Nothing is
downloaded.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.random import Generator

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.musdb18_tracks import DEMO_NOTE, VALIDATION_TRACKS
from local.stems import decode_track
from local.tools.command_line import OneLineParser, UserError, clear_errors, raise_together
from local.tools.files import atomic_path, is_foreign
from local.tools.progress import add_progress_flags, set_progress, show_progress

# Seconds of a song: room for an empty beat and some singing; what fits in memory.
SHORTEST, LONGEST = 3.0, 600.0
TRAIN_ARTISTS = ("Demo Singer", "M.C. Demo & The Sines", "Démo d'Été")
# A track of the train split with such a name is a validation track.
VALID_NAMES = VALIDATION_TRACKS[:2]
TEST_NAMES = ("Demo Choir - Test Song", "Dr. Demo & Señor Sine - It's No. 2", "The Demos - Don't")
EXCERPT_NAME = "The Easton Ellises - Falcon 69"


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.demo_musdb18", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make, for train.py's --root")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a song")
    parser.add_argument("--tracks", type=int, default=8, help="songs to train on")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other songs")
    add_progress_flags(parser)
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        make_demo(args.out, args.seconds, args.tracks, args.seed)
    print(f"{args.out} is ready for train.py --root")


def make_demo(out: str | Path, seconds: float = 12.0, tracks: int = 8, seed: int = 0) -> None:
    """Make the missing tracks of `out`/train and `out`/test.

    A song depends on `seed`, `seconds`, its split and its number there, not on other songs.

    Raises:
        UserError: an argument is out of range; `out` cannot be written; or `out` holds anything
            but a demo of these arguments, and then nothing is changed.
    """
    out, faults = Path(out), []
    if not SHORTEST <= seconds <= LONGEST:
        faults.append(f"--seconds must be from {SHORTEST:g} to {LONGEST:g}, got {seconds:g}")
    if tracks < 1:
        faults.append(f"--tracks must be at least 1, got {tracks}")
    if seed < 0:
        faults.append(f"--seed must not be negative, got {seed}")
    raise_together(faults)
    try:
        claim(out, {"seconds": float(seconds), "tracks": tracks, "seed": seed})
        folders = song_folders(out, tracks)
        with show_progress("demo", len(folders), "songs") as bar:
            for key, folder in folders:
                if not folder.exists():
                    write_song(np.random.default_rng((seed, *key)), seconds, folder)
                bar.update()
        add_excerpt(out / "test" / EXCERPT_NAME)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None


def claim(out: Path, arguments: dict) -> None:
    """Make `out`, with a note of its arguments. Raise a UserError where it holds anything else."""
    note, wanted = out / DEMO_NOTE, json.dumps(arguments)
    remedy = "delete it or name another folder"
    if note.is_file():
        if note.read_text() != wanted:
            raise UserError(f"{out} was made with {note.read_text()}, not {wanted}; {remedy}")
        return
    out.mkdir(parents=True, exist_ok=True)
    if not all(map(is_foreign, out.iterdir())):
        raise UserError(f"{out} holds files that are not of this command; {remedy}")
    with atomic_path(note) as temporary:
        temporary.write_text(wanted)


def song_folders(out: Path, tracks: int) -> list[tuple[tuple[int, int], Path]]:
    """Return (what seeds a song, besides the seed of the demo; its folder) of all songs."""
    artists = [TRAIN_ARTISTS[k % len(TRAIN_ARTISTS)] for k in range(tracks)]
    train_names = [f"{artist} {k:02d} - Song {k}" for k, artist in enumerate(artists, start=1)]
    groups = [("train", train_names), ("train", VALID_NAMES), ("test", TEST_NAMES)]
    return [
        ((group, k), out / split / name)
        for group, (split, names) in enumerate(groups)
        for k, name in enumerate(names)
    ]


def write_song(rng: Generator, seconds: float, folder: Path) -> None:
    """Synthesise a song. `folder` appears when all five files are written."""
    from scipy.io import wavfile

    from local.demo.songs import synthesise_song
    from local.demo.sounds import RATE

    stems = {source: to_pcm(rng, stem) for source, stem in synthesise_song(rng, seconds).items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for source, pcm in {**stems, "mixture": sum(stems.values())}.items():
            wavfile.write(temporary / f"{source}.wav", RATE, pcm)


def to_pcm(rng: Generator, stem: np.ndarray) -> np.ndarray:
    """Turn (2, T) within [-1, 1] into (T, 2) int16, with triangular dither of one step.

    Without dither, rests would be all zeros, and museval gives no scores for such frames.
    """
    dither = rng.uniform(-0.5, 0.5, size=(2, *stem.shape)).sum(axis=0)
    return np.rint(32767 * stem + dither).astype(np.int16).T


def add_excerpt(folder: Path) -> None:
    """Decode the excerpt in the stempeg package: six seconds of a real track with its stems."""
    if folder.exists():
        return
    if shutil.which("ffmpeg") is None:
        print(
            f"ffmpeg is not on the PATH, so {folder.name} is omitted; install it and run again",
            file=sys.stderr,
        )
        return
    import stempeg  # importing it fails without ffmpeg

    decode_track(Path(stempeg.example_stem_path()), folder)


if __name__ == "__main__":
    main()
