"""--examples: how the first validation tracks sound while a run learns, for TensorBoard."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from local.sdr import sum_sdr
from local.train.event_file import EventFile, make_audio, make_image
from local.train.run_log import WarnOnce
from local.train.spectrograms import draw_spectrograms

PAUSE = 600.0  # seconds, at least, between two rounds of examples
SECONDS = 10  # of a track


class Example(NamedTuple):
    """A piece of a validation track.

    Args:
        signals: "mixture" and the names of the estimates -> (T, channels).
        sdr: target -> in dB; without those that are silent.
    """

    track: str
    signals: dict[str, np.ndarray]
    sdr: dict[str, float]


class Examples(pl.Callback):
    """After validations, at most every ten minutes, writes ten seconds of the first tracks: audio,
    spectrograms and SDR. They are cut out of what validation has computed.

    On several devices they are the first tracks of the first one. Their files are in a folder of
    their own, a run of its own to TensorBoard, and may be deleted.

    Args:
        count: of the tracks.
    """

    def __init__(self, exp_dir: Path, count: int):
        self.folder, self.count = exp_dir / "tensorboard" / "examples", count
        self._warning, self._examples, self._is_due = WarnOnce(self.folder), [], False
        self._time = 0.0  # of the last round
        self._mixtures = 0  # of how many tracks the mixture is there

    def state_dict(self) -> dict:
        return {"time": self._time, "mixtures": self._mixtures}

    def load_state_dict(self, state_dict):
        self._time, self._mixtures = state_dict["time"], state_dict["mixtures"]

    def on_train_start(self, trainer, pl_module):
        self._file = EventFile(self.folder, trainer.global_step)
        if not self.folder.is_dir():
            self._mixtures = 0
        elif trainer.is_global_zero:
            with self._warning:
                self._file.write(trainer.global_step)  # voids what will be written again

    def on_validation_start(self, trainer, pl_module):
        self._examples.clear()
        has_paused = not 0 <= time.time() - self._time < PAUSE  # the clock may have been set back
        self._is_due = trainer.is_global_zero and not trainer.sanity_checking and has_paused

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._is_due and batch_idx < self.count and outputs is not None:
            track = pl_module.val_loader.dataset.tracks[batch_idx * trainer.world_size]
            tensors = [part[0] for part in (*batch, outputs)]
            self._examples.append(make_example(track.name, track.rate, pl_module.targets, *tensors))

    def on_validation_end(self, trainer, pl_module):
        """Comes after EpochStatistics, which ends a run whose estimates are not finite."""
        if not self._examples:
            return
        rate, step = pl_module.config["data"]["sample_rate"], trainer.global_step - 1
        values = [
            value
            for number, example in enumerate(self._examples)
            for value in list_values(example, rate, number >= self._mixtures)
        ]
        self._time = time.time()
        with self._warning:
            self._file.write(step, values)
            self._mixtures = max(self._mixtures, len(self._examples))
        self._examples.clear()


def make_example(
    track: str,
    rate: int,
    names: tuple[str, ...],
    mixture: Tensor,
    targets: Tensor,
    estimates: Tensor,
) -> Example:
    """The piece of a track in which the first target, the vocals, is loudest.

    Args:
        names: of the targets.

    Shape:
        - mixture: (2, T)
        - targets, estimates: (C, 2, T)
    """
    start = find_loudest(targets[0], rate)
    mixture, targets, estimates = (
        part[..., start : start + SECONDS * rate].float().cpu()
        for part in (mixture, targets, estimates)
    )
    signals = dict(zip(("mixture", *names), (mixture, *estimates), strict=True))
    totals, counts = sum_sdr(estimates[None], targets[None]).tolist()
    sdr = {name: x for name, x, count in zip(names, totals, counts, strict=True) if count}
    return Example(track, {name: signal.T.numpy() for name, signal in signals.items()}, sdr)


def find_loudest(signal: Tensor, rate: int) -> int:
    """The first sample of the loudest SECONDS of a (channels, T) signal, at a whole second; 0 where
    there are no more.
    """
    if signal.shape[-1] < SECONDS * rate:
        return 0
    energies = signal.unfold(-1, rate, rate).square().sum((0, -1))  # of every second
    return int(energies.unfold(0, SECONDS, 1).sum(-1).argmax()) * rate


def list_values(example: Example, rate: int, with_mixture: bool) -> Iterator[Summary.Value]:
    """What TensorBoard shows of an example.

    Args:
        with_mixture: as audio, which need not be written again for every round.
    """
    figure = draw_spectrograms(example.signals, rate)
    yield make_image(f"{example.track}/spectrograms", figure)
    for name, samples in example.signals.items():
        if with_mixture or name != "mixture":
            yield make_audio(f"{example.track}/{name}", samples, rate)
    for name, sdr in example.sdr.items():
        yield Summary.Value(tag=f"{example.track}/sdr_{name}", simple_value=sdr)
