"""A small data set in the layout of MUSDB18-HQ, synthesised on the spot.

`python -m local.demo_musdb18 OUT` makes OUT/train/TRACK/{mixture,vocals,drums,bass,other}.wav and
OUT/test/... likewise.

MUSDB18 cannot be shipped; these songs stand in for it. A formant-shaped voice, drums, bass and
chords share tempo and key within a song and differ from song to song in whatever a producer would
choose, so that a small ConvTasNet learns something that holds for songs it has not heard. One real
recording, the excerpt embedded in the stempeg package, joins the test split. Nothing is downloaded.

Below, times are in seconds, notes are MIDI numbers, and a track of audio is (2, samples).
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from scipy.io import wavfile
from scipy.signal import butter, fftconvolve, sosfilt
from tqdm import tqdm

from local.musdb18_tracks import VALIDATION_TRACKS
from local.stems import decode_track
from local.tools.command_line import OneLineParser, UserError, clear_errors, raise_together
from local.tools.files import atomic_path

RATE = 44100
SHORTEST, LONGEST = 3.0, 600.0  # room for a counted-in beat and some singing; what fits in memory
TRAIN_ARTISTS = ("Demo Singer", "M.C. Demo & The Sines", "Démo d'Été")
# It is its name that makes a track of the train split a validation track.
VALID_NAMES = VALIDATION_TRACKS[:2]
TEST_NAMES = ("Demo Choir - Test Song", "Dr. Demo & Señor Sine - It's No. 2", "The Demos - Don't")
EXCERPT_NAME = "The Easton Ellises - Falcon 69"

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
PROGRESSIONS = ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 4, 3), (5, 3, 0, 4), (0, 2, 3, 4), (0, 3, 0, 4))
# Five formants, in Hz, of a sung a, e, i, o and u; below, how wide (Hz) and how loud they are.
VOWELS = np.array(
    [
        (750, 1150, 2800, 3500, 4950),
        (450, 1700, 2700, 3550, 4950),
        (320, 1900, 2800, 3600, 4950),
        (450, 820, 2750, 3500, 4950),
        (340, 700, 2650, 3500, 4950),
    ]
)
FORMANT_WIDTHS = np.array([90, 110, 140, 170, 220])
FORMANT_GAINS = np.array([1.0, 0.6, 0.35, 0.3, 0.12])
CURVE_RATE = 210  # values a second of the curves that steer the voice


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.demo_musdb18", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make, for train.py's --root")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a song")
    parser.add_argument("--tracks", type=int, default=8, help="songs to train on")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other songs")
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        make_demo(**vars(args))
    print(f"{args.out} is ready for train.py --root")


def make_demo(out: str | Path, seconds: float = 12.0, tracks: int = 8, seed: int = 0) -> None:
    """Fills `out`/train and `out`/test; tracks that are there already are kept.

    A song depends on `seed`, `seconds`, its split and its place therein, not on other songs.

    Raises:
        UserError: an argument is out of range; `out` cannot be written; or it holds other things
            than a demo of these arguments, and then nothing is changed.
    """
    out, faults = Path(out), []
    if not SHORTEST <= seconds <= LONGEST:
        faults.append(f"--seconds must be from {SHORTEST:g} to {LONGEST:g}, got {seconds:g}")
    if tracks < 1:
        faults.append(f"--tracks must be at least 1, got {tracks}")
    if seed < 0:
        faults.append(f"--seed must not be negative, got {seed}")
    raise_together(faults, heading="the demo")
    try:
        claim(out, {"seconds": float(seconds), "tracks": tracks, "seed": seed})
        for key, folder in tqdm(song_folders(out, tracks), desc="demo", unit="song"):
            if not folder.exists():
                write_song(np.random.default_rng((seed, *key)), seconds, folder)
        add_excerpt(out / "test" / EXCERPT_NAME)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None


def claim(out: Path, arguments: dict) -> None:
    """Makes `out`, with a note of what it is made from; a UserError where it is anything else."""
    note, wanted = out / ".demo_musdb18.json", json.dumps(arguments)
    remedy = "delete it or name another folder"
    if note.is_file():
        if note.read_text() != wanted:
            raise UserError(f"{out} was made with {note.read_text()}, not {wanted}; {remedy}")
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} holds files that are no demo of this command; {remedy}")
    with atomic_path(note) as temporary:
        temporary.write_text(wanted)


def song_folders(out: Path, tracks: int) -> list[tuple[tuple[int, int], Path]]:
    """What tells a song's random numbers from those of others, and where it goes."""
    artists = [TRAIN_ARTISTS[k % len(TRAIN_ARTISTS)] for k in range(tracks)]
    train_names = [f"{artist} {k:02d} - Song {k}" for k, artist in enumerate(artists, start=1)]
    groups = [("train", train_names), ("train", VALID_NAMES), ("test", TEST_NAMES)]
    return [
        ((group, k), out / split / name)
        for group, (split, names) in enumerate(groups)
        for k, name in enumerate(names)
    ]


def write_song(rng: Generator, seconds: float, folder: Path) -> None:
    """Synthesises a song; `folder` appears when all five files are there."""
    stems = {source: to_pcm(rng, stem) for source, stem in synthesise_song(rng, seconds).items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for source, pcm in {**stems, "mixture": sum(stems.values())}.items():
            wavfile.write(temporary / f"{source}.wav", RATE, pcm)


def to_pcm(rng: Generator, stem: np.ndarray) -> np.ndarray:
    """(2, T) within [-1, 1] -> (T, 2) int16, with triangular dither of one step, as studios do.

    A rest then is as soft as 16 bits allow but not all zeros, where museval would give no scores.
    """
    dither = rng.uniform(-0.5, 0.5, size=(2, *stem.shape)).sum(axis=0)
    return np.rint(32767 * stem + dither).astype(np.int16).T


def add_excerpt(folder: Path) -> None:
    """Decodes the six seconds of a real track, with its stems, that stempeg carries."""
    if folder.exists():
        return
    if shutil.which("ffmpeg") is None:
        print(f"no ffmpeg, so without {folder.name}; run again to add it", file=sys.stderr)
        return
    import stempeg  # fails without ffmpeg

    decode_track(Path(stempeg.example_stem_path()), folder)


# A song and its musicians.


@dataclass(frozen=True)
class Song:
    """What the musicians agree on."""

    beat: float
    tonic: int  # a note from 0 to 11
    scale: tuple[int, ...]
    progression: tuple[int, ...]  # the chord's degree in each bar of four beats

    def note(self, degree: int) -> int:
        """Degree 0 is the tonic, 7 the tonic an octave above."""
        return self.tonic + 12 * (degree // 7) + self.scale[degree % 7]

    def bars(self, seconds: float) -> Iterator[tuple[float, int]]:
        """Start of each bar, degree of its chord."""
        for bar in range(int(np.ceil(seconds / (4 * self.beat)))):
            yield bar * 4 * self.beat, self.progression[bar % len(self.progression)]


def compose(rng: Generator) -> Song:
    return Song(
        beat=60 / rng.uniform(80, 140),
        tonic=int(rng.integers(12)),
        scale=(MAJOR, MINOR)[rng.integers(2)],
        progression=PROGRESSIONS[rng.integers(len(PROGRESSIONS))],
    )


def synthesise_song(rng: Generator, seconds: float) -> dict[str, np.ndarray]:
    """Vocals, drums, bass and other, (2, T) float32; they and their sum stay within [-0.9, 0.9]."""
    song, samples = compose(rng), round(seconds * RATE)
    play = {"vocals": sing, "drums": play_drums, "bass": play_bass, "other": play_chords}
    stems = {source: at_unit_level(play[source](rng, song, samples)) for source in play}
    for source in ("drums", "bass", "other"):
        stems[source] *= 10 ** rng.uniform(-0.1, 0.1)  # 2 dB up or down
    band = stems["drums"] + stems["bass"] + stems["other"]
    stems["vocals"] *= level(band) * 10 ** rng.uniform(-0.25, -0.05)  # 5 to 1 dB below
    peak = max(np.abs(track).max() for track in (*stems.values(), stems["vocals"] + band))
    return {source: (0.9 / peak * stem).astype(np.float32) for source, stem in stems.items()}


def sing(rng: Generator, song: Song, samples: int) -> np.ndarray:
    """Harmonics under gliding formants, with vibrato, breath and consonants."""
    starts, ends, notes = np.array(list(melody(rng, song, samples / RATE))).T
    time = np.arange(samples * CURVE_RATE // RATE + 2) / CURVE_RATE
    now = np.searchsorted(starts, time, side="right").clip(1) - 1  # in a rest, the note before
    since = time - starts[now]
    consonant = rng.choice([0, 0, 0.3, 0.6], len(notes))[now] * (0 <= since) * (since < 0.06)
    sung = (0 <= since) * (time < ends[now]) * (consonant == 0)
    loudness = smooth(rng.uniform(0.6, 1.0, len(notes))[now] * sung, 0.05)

    glide = rng.uniform(0.06, 0.14)
    vibrato = rng.uniform(0.1, 0.4) * np.sin(2 * np.pi * rng.uniform(4.8, 6.5) * time)
    drift = smooth(rng.normal(0, 0.5, len(time)), 0.1)
    pitch = smooth(notes[now], glide) + vibrato + drift
    throat = rng.uniform(0.9, 1.15)  # a short one raises all formants
    vowels = VOWELS[rng.integers(len(VOWELS), size=len(notes))][now]
    formants = throat * np.stack([smooth(formant, glide) for formant in vowels.T], axis=1)

    voice = resonate(hertz(pitch), formants, loudness, rng.uniform(0.3, 0.8), samples)
    breath = at_audio_rate(rng.uniform(0.02, 0.06) * loudness + smooth(consonant, 0.02), samples)
    air = breath * noise(rng, samples, rng.uniform(2000, 4000), 11000)
    return in_room(rng, pan(at_unit_level(voice) + air, rng.uniform(-0.15, 0.15)), 0.15)


def melody(rng: Generator, song: Song, seconds: float) -> Iterator[tuple[float, float, int]]:
    """Start, end and note of all that is sung: phrases of one to two bars, with rests between."""
    lowest = rng.integers(45, 62)  # from a baritone's A2 to a soprano's C#4
    tonic = 7 * int(np.ceil((lowest - song.tonic) / 12))
    degree, start = int(rng.integers(8)), song.beat  # the first beat is counted in
    while start < seconds:
        phrase_end = min(seconds, start + song.beat * rng.integers(4, 9))
        while start < phrase_end:
            end = start + song.beat * rng.choice([0.5, 0.5, 1, 1, 1.5, 2])
            degree = int(np.clip(degree + rng.choice([-2, -1, -1, 0, 1, 1, 2, 4]), 0, 9))
            yield start, end, song.note(tonic + degree)
            start = end
        start += song.beat * rng.choice([1, 1, 2])


def resonate(
    frequency: np.ndarray, formants: np.ndarray, loudness: np.ndarray, tilt: float, samples: int
) -> np.ndarray:
    """All harmonics up to 8 kHz of a gliding tone, as loud as its formants make them.

    Shape: frequency (K,) and formants (K, 5) in Hz, loudness (K,) -> (samples,)
    """
    turn = np.exp(2j * np.pi / RATE * np.cumsum(at_audio_rate(frequency, samples)))
    voice, phasor = np.zeros(samples), np.ones(samples, complex)
    for harmonic in range(1, int(8000 / frequency.max()) + 1):
        phasor *= turn
        distance = (harmonic * frequency[:, None] - formants) / (FORMANT_WIDTHS / 2)
        gain = loudness * (FORMANT_GAINS / np.hypot(1, distance)).sum(axis=1) / harmonic**tilt
        voice += at_audio_rate(gain, samples) * phasor.imag
    return voice


def play_drums(rng: Generator, song: Song, samples: int) -> np.ndarray:
    """Kick, snare and hi-hat: one pattern of sixteenths, bar after bar."""
    kit = {
        "kick": pan(kick(rng), 0),
        "snare": pan(burst(rng, rng.uniform(0.05, 0.1), 180, 8000), rng.uniform(-0.2, 0.2)),
        "hat": pan(burst(rng, rng.uniform(0.02, 0.06), 6000, 15000), rng.uniform(-0.6, 0.6)),
    }
    pattern = {
        "kick": (1.0, [0, 8, *rng.choice([3, 6, 7, 10, 11, 14], size=2, replace=False)]),
        "snare": (0.8, [4, 12, rng.choice([7, 9, 15])]),
        "hat": (0.3, range(0, 16, rng.choice([1, 2, 4]))),
    }
    hits = [
        (start + step * song.beat / 4, drum, loudness * rng.uniform(0.7, 1.0))
        for start, _ in song.bars(samples / RATE)
        for drum, (loudness, steps) in pattern.items()
        for step in steps
    ]
    return in_room(rng, arrange(hits, kit, samples), rng.uniform(0.05, 0.2))


def kick(rng: Generator) -> np.ndarray:
    """A sine that falls from a click to a thump."""
    time = np.arange(int(0.4 * RATE)) / RATE
    fall = rng.uniform(0.02, 0.05)
    cycles = rng.uniform(45, 65) * time - rng.uniform(100, 250) * fall * np.exp(-time / fall)
    return np.sin(2 * np.pi * cycles) * np.exp(-time / rng.uniform(0.08, 0.15))


def play_bass(rng: Generator, song: Song, samples: int) -> np.ndarray:
    """The roots of the chords and some fifths, in one rhythm of eighths."""
    lowest, tilt, decay = int(rng.integers(28, 33)), rng.uniform(1.2, 2.2), rng.uniform(0.3, 0.8)
    steps = [0, *np.flatnonzero(rng.random(7) < 0.6) + 1]
    line = [(step, rng.choice([0, 0, 0, 4]) if step else 0) for step in steps]
    hits = [
        (start + step * song.beat / 2, within_octave(song.note(root + interval), lowest), 1.0)
        for start, root in song.bars(samples / RATE)
        for step, interval in line
    ]
    notes = {note for _, note, _ in hits}
    sounds = {note: pan(tone(note, 3 * decay, tilt, decay, 0.005), 0) for note in notes}
    return in_room(rng, arrange(hits, sounds, samples), 0.03)


def play_chords(rng: Generator, song: Song, samples: int) -> np.ndarray:
    """A pad that holds each chord, and a plucked arpeggio over it."""
    lowest = int(rng.integers(50, 60))
    chords = [
        (start, [within_octave(song.note(root + third), lowest) for third in (0, 2, 4)])
        for start, root in song.bars(samples / RATE)
    ]
    notes = {note for _, chord in chords for note in chord}

    length, tilt = 4 * song.beat + 0.2, rng.uniform(0.8, 1.8)
    places = rng.uniform(-0.8, 0.8, size=12)
    pads = {note: pan(tone(note, length, tilt, 10, 0.2), places[note % 12]) for note in notes}
    held = arrange([(start, note, 1.0) for start, chord in chords for note in chord], pads, samples)

    octave, tilt, decay = rng.choice([0, 12]), rng.uniform(0.8, 1.6), rng.uniform(0.15, 0.5)
    side = rng.uniform(-0.5, 0.5)
    plucks = {note: pan(tone(note + octave, 3 * decay, tilt, decay, 0.005), side) for note in notes}
    order, per_beat = rng.permutation([0, 1, 2, 1]), rng.choice([2, 4])
    arpeggio = [
        (start + step * song.beat / per_beat, chord[order[step % 4]], rng.uniform(0.7, 1.0))
        for start, chord in chords
        for step in range(4 * per_beat)
    ]
    plucked = arrange(arpeggio, plucks, samples)

    balance = rng.uniform(0.3, 0.7)
    both = balance * at_unit_level(held) + (1 - balance) * at_unit_level(plucked)
    return in_room(rng, both, rng.uniform(0.1, 0.3))


# Sounds: (n,) while mono, (2, n) once panned.


def tone(note: float, seconds: float, tilt: float, decay: float, attack: float) -> np.ndarray:
    """Twelve partials; the larger `tilt`, the duller. They fade in `decay`, the higher sooner."""
    time = np.arange(int(seconds * RATE)) / RATE
    partial = np.arange(1, 13)[:, None]
    strength = np.exp(-time * np.sqrt(partial) / decay) / partial**tilt
    ends = np.clip(np.minimum(time, time[-1] - time) / attack, 0, 1)
    return ends * (strength * np.sin(2 * np.pi * hertz(note) * partial * time)).sum(axis=0)


def burst(rng: Generator, decay: float, low: float, high: float) -> np.ndarray:
    """Noise between two frequencies in Hz that starts at once and dies away."""
    time = np.arange(int(5 * decay * RATE)) / RATE
    return noise(rng, len(time), low, high) * np.exp(-time / decay)


def noise(rng: Generator, samples: int, low: float, high: float) -> np.ndarray:
    band = butter(2, (low, high), "bandpass", fs=RATE, output="sos")
    return at_unit_level(sosfilt(band, rng.normal(size=samples)))


def arrange(hits: list[tuple[float, object, float]], sounds: dict, samples: int) -> np.ndarray:
    """The sum of all hits: when, which of the sounds (2, n), how loud."""
    track = np.zeros((2, samples))
    for start, which, loudness in hits:
        here = track[:, round(start * RATE) :]
        sound = sounds[which][:, : here.shape[1]]
        here[:, : sound.shape[1]] += loudness * sound
    return track


def pan(mono: np.ndarray, side: float) -> np.ndarray:
    """(n,) -> (2, n) of the same power, from -1, left, to 1, right."""
    angle = np.pi / 4 * (1 + side)
    return np.stack([np.cos(angle) * mono, np.sin(angle) * mono])


def in_room(rng: Generator, dry: np.ndarray, wet: float) -> np.ndarray:
    """Adds an echo, unlike in the two ears, `wet` times the level of the sound."""
    time = np.arange(int(0.4 * RATE)) / RATE
    response = rng.normal(size=(2, len(time))) * np.exp(-time / 0.08)
    echo = fftconvolve(dry, response, axes=1)[:, : dry.shape[1]]
    return dry + wet * level(dry) * at_unit_level(echo)


def smooth(curve: np.ndarray, seconds: float) -> np.ndarray:
    """Moving average of a curve (K,) under a raised cosine of that length."""
    half = round(seconds * CURVE_RATE / 2)
    window = np.hanning(2 * half + 3)[1:-1]
    return np.convolve(np.pad(curve, half, mode="edge"), window / window.sum(), mode="valid")


def at_audio_rate(curve: np.ndarray, samples: int) -> np.ndarray:
    return np.interp(np.arange(samples) * CURVE_RATE / RATE, np.arange(len(curve)), curve)


def within_octave(note: int, lowest: int) -> int:
    """The note of that name among the twelve from `lowest` up."""
    return lowest + (note - lowest) % 12


def hertz(note):
    return 440 * 2 ** ((note - 69) / 12)


def level(audio: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(audio**2)))


def at_unit_level(audio: np.ndarray) -> np.ndarray:
    return audio / level(audio)


if __name__ == "__main__":
    main()
