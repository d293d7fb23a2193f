"""What the songs of the demo play: a voice, drums, bass and chords that share tempo and key.

Times are in seconds, notes are MIDI numbers, and a track of audio is (2, samples).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from local.demo.sounds import (
    CURVE_RATE,
    RATE,
    VOWELS,
    arrange,
    at_audio_rate,
    at_unit_level,
    burst,
    hertz,
    in_room,
    kick,
    level,
    noise,
    pan,
    resonate,
    smooth,
    tone,
    within_octave,
)

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
PROGRESSIONS = ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 4, 3), (5, 3, 0, 4), (0, 2, 3, 4), (0, 3, 0, 4))


@dataclass(frozen=True)
class Song:
    """What all stems of a song share."""

    beat: float
    tonic: int  # a note from 0 to 11
    scale: tuple[int, ...]
    progression: tuple[int, ...]  # degree of the chord, bar by bar, of four beats each

    def note(self, degree: int) -> int:
        """Return the note of a degree: 0 is the tonic, 7 the tonic an octave above."""
        return self.tonic + 12 * (degree // 7) + self.scale[degree % 7]

    def bars(self, seconds: float) -> Iterator[tuple[float, int]]:
        """Yield start of each bar and degree of its chord."""
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
    """Return source -> (2, T) float32. The sources and their sum stay within [-0.9, 0.9]."""
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
    """Return the vocals: harmonics under moving formants, with vibrato, breath and consonants."""
    starts, ends, notes = np.array(list(melody(rng, song, samples / RATE))).T
    time = np.arange(samples * CURVE_RATE // RATE + 2) / CURVE_RATE
    now = np.searchsorted(starts, time, side="right").clip(1) - 1  # in a rest, the previous note
    since = time - starts[now]
    consonant = rng.choice([0, 0, 0.3, 0.6], len(notes))[now] * (0 <= since) * (since < 0.06)
    sung = (0 <= since) * (time < ends[now]) * (consonant == 0)
    loudness = smooth(rng.uniform(0.6, 1.0, len(notes))[now] * sung, 0.05)

    glide = rng.uniform(0.06, 0.14)
    vibrato = rng.uniform(0.1, 0.4) * np.sin(2 * np.pi * rng.uniform(4.8, 6.5) * time)
    drift = smooth(rng.normal(0, 0.5, len(time)), 0.1)
    pitch = smooth(notes[now], glide) + vibrato + drift
    throat = rng.uniform(0.9, 1.15)  # a short throat raises all formants
    vowels = VOWELS[rng.integers(len(VOWELS), size=len(notes))][now]
    formants = throat * np.stack([smooth(formant, glide) for formant in vowels.T], axis=1)

    voice = resonate(hertz(pitch), formants, loudness, rng.uniform(0.3, 0.8), samples)
    breath = at_audio_rate(rng.uniform(0.02, 0.06) * loudness + smooth(consonant, 0.02), samples)
    air = breath * noise(rng, samples, rng.uniform(2000, 4000), 11000)
    return in_room(rng, pan(at_unit_level(voice) + air, rng.uniform(-0.15, 0.15)), 0.15)


def melody(rng: Generator, song: Song, seconds: float) -> Iterator[tuple[float, float, int]]:
    """Yield start, end and note: phrases of one to two bars, with rests between them."""
    lowest = rng.integers(45, 62)  # from a baritone's A2 to a soprano's C#4
    tonic = 7 * int(np.ceil((lowest - song.tonic) / 12))
    degree, start = int(rng.integers(8)), song.beat  # the first beat is empty
    while start < seconds:
        phrase_end = min(seconds, start + song.beat * rng.integers(4, 9))
        while start < phrase_end:
            end = start + song.beat * rng.choice([0.5, 0.5, 1, 1, 1.5, 2])
            degree = int(np.clip(degree + rng.choice([-2, -1, -1, 0, 1, 1, 2, 4]), 0, 9))
            yield start, end, song.note(tonic + degree)
            start = end
        start += song.beat * rng.choice([1, 1, 2])


def play_drums(rng: Generator, song: Song, samples: int) -> np.ndarray:
    """Return kick, snare and hi-hat: the same pattern of sixteenths in every bar."""
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


def play_bass(rng: Generator, song: Song, samples: int) -> np.ndarray:
    """Return the bass: roots of the chords and some fifths, in the same rhythm of eighths."""
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
    """Return a pad that holds each chord, and a plucked arpeggio."""
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
