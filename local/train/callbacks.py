"""What a run does beside training and validation: a callback for each task."""

from pathlib import Path

import pytorch_lightning as pl

from local.train.average import WeightAverage
from local.train.checkpoints import LastCheckpoints, RandomStates
from local.train.devices import EndOtherRanks
from local.train.display import Forecast, make_progress
from local.train.epochs import (
    EpochStatistics,
    FreeCachedMemory,
    GradientNorms,
    SkippedSteps,
    StopAtMaxSteps,
)
from local.train.examples import Examples
from local.train.interrupts import Interrupts
from local.train.start import StartLoss


def make_run_callbacks(conf: dict) -> list[pl.Callback]:
    """The callbacks that keep a run alive, keep its records and show it."""
    training, exp_dir = conf["training"], Path(conf["main_args"]["exp_dir"])
    interrupts = Interrupts()
    callbacks = [
        EndOtherRanks(),
        interrupts,
        make_progress(),
        Forecast(),
        StopAtMaxSteps(training["max_steps"]),
        SkippedSteps(training["max_skipped_steps"]),
        GradientNorms(),
        EpochStatistics(),
        FreeCachedMemory(),
        *([Examples(exp_dir, training["examples"])] if training["examples"] else []),
        *([StartLoss()] if training["init"] else []),
        RandomStates(),
        LastCheckpoints(exp_dir / "checkpoints", training["checkpoint_every"], interrupts),
    ]
    # Its on_train_end makes the model the average, which LastCheckpoints must not see.
    return [*callbacks, WeightAverage(training["ema"])] if training["ema"] else callbacks
