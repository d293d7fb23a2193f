"""The audio of a track, read and written, with its pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from local.eval.tracks import TestTrack, read_track
from local.listen.analysis import Analysis, analyse, find_loudest
from local.listen.audio import read_audio, write_samples
from local.listen.overview import Overview
from local.listen.players import Player, list_players
from local.listen.runs import list_targets
from local.tools.command_line import UserError

MEL_RANGE = 80  # dB, from black to white


@dataclass(frozen=True)
class Options:
    """What a page holds.

    Args:
        audio: one of choices.AUDIO_FORMATS.
        excerpt: seconds of audio of each track; None for all of it.
        with_references: whether the data set's audio is in it.
    """

    audio: str = "flac"
    excerpt: int | None = None
    with_references: bool = True


@dataclass(frozen=True)
class TrackPlan:
    """A track of the page.

    Args:
        number: from 1 on; also the name of its files.
        reference: where the data set's audio is read from; None where it is not in the page.
        rate: of its audio, in Hz.
    """

    number: int
    name: str
    overview: Overview
    reference: TestTrack | None
    rate: int

    @property
    def targets(self) -> list[str]:
        return list_targets(self.overview.runs, self.name)

    @property
    def players(self) -> list[Player]:
        return list_players(self.overview.runs, self.name, self.reference is not None)

    def read_signals(self) -> dict[tuple[str, str], Callable[[], np.ndarray]]:
        """Return (target, run) of each player -> what reads its samples (2, T)."""
        readers = {}
        if self.reference:
            audio, _ = read_track(self.reference, with_stems=len(self.targets) > 2)
            readers |= {("", ""): lambda: audio["mixture"]}
            readers |= {(t, ""): lambda t=t: audio[t] for t in self.targets if t in audio}
        for run in self.overview.runs:
            for target, file in run.estimates.get(self.name, {}).items():
                readers[target, run.name] = lambda file=file: read_audio(file)
        return readers


def write_audio(
    plan: TrackPlan, players: list[Player], files: Path, options: Options
) -> tuple[dict[Player, Analysis], dict[Player, int], int, float]:
    """Return (player -> what is shown of it, player -> how many of its samples were clipped, where
    the audio begins in the track, its length), in seconds.
    """
    try:
        readers = plan.read_signals()
    except ValueError as error:
        raise UserError(f"{plan.name}: {error}") from None
    start = choose_start(players, readers, plan.rate, options.excerpt)
    analyses, clipped, seconds = {}, {}, 0.0
    for player in players:
        samples = readers[player.target, player.run]()
        if options.excerpt:
            samples = samples[:, start * plan.rate :][:, : options.excerpt * plan.rate]
        seconds = max(seconds, samples.shape[1] / plan.rate)
        file = files / f"{player.number}.{options.audio}"
        clipped[player] = write_samples(file, samples, plan.rate, options.audio)
        analyses[player] = analyse(samples, plan.rate)
    return analyses, clipped, start, seconds


def choose_start(players: list[Player], readers: dict, rate: int, excerpt: int | None) -> int:
    """Return where the excerpt begins: the loudest passage of the first vocals, or else of the
    first player.
    """
    if not excerpt:
        return 0
    first = next((p for p in players if p.target == "vocals"), players[0])
    return find_loudest(readers[first.target, first.run](), rate, excerpt)


def draw_spectrograms(analyses: dict[Player, Analysis], files: Path) -> None:
    """Write NUMBER.png for each player: columns over time, low frequencies at the bottom."""
    from matplotlib.image import imsave  # takes a second to import

    highest = max(float(analysis.mel.max()) for analysis in analyses.values())
    for player, analysis in analyses.items():
        limits = {"vmin": highest - MEL_RANGE, "vmax": highest}
        path = files / f"{player.number}.png"
        imsave(path, analysis.mel, cmap="magma", origin="lower", format="png", **limits)
