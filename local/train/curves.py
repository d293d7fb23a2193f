"""EXP/curves.png: losses, SDR, learning rate and speed over the epochs, drawn from metrics.csv."""

import time
from pathlib import Path

import numpy as np
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from local.losses import LOSSES
from local.tools.files import atomic_path
from local.train.run_log import WarnOnce

SHARE = 0.01  # of the time of a run, at most, that goes into drawing
SDR = "val_sdr_"  # begins the names of the columns of whole-track SDR
SPEED = "items per second"
MOST_DOTS = 40  # epochs up to which each is a dot as well: the line of a single one is none


class Curves(Logger):
    """Draws curves.png after every epoch; of epochs that take less than half a minute not after
    each, but after the last. It follows the EpochTable, whose file it reads, among the loggers.

    Args:
        loss: its name in LOSSES.
    """

    name, version = "curves.png", ""

    def __init__(self, exp_dir: Path, loss: str):
        super().__init__()
        self.path, self.table = exp_dir / "curves.png", exp_dir / "logs" / "metrics.csv"
        is_in_decibels = getattr(LOSSES[loss], "is_in_decibels", False)
        self.loss = f"{loss} loss in dB" if is_in_decibels else f"{loss} loss"
        self._warning, self._next_time, self._is_due = WarnOnce(self.path), 0.0, False

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        if "train_loss" in metrics:  # which is logged last, see EpochStatistics
            self._is_due = True
            if time.monotonic() >= self._next_time:
                self._draw()

    @rank_zero_only
    def finalize(self, status):
        if self._is_due:
            self._draw()

    def _draw(self) -> None:
        import matplotlib.figure  # noqa: F401  # takes a second, once: not to be counted

        start = time.monotonic()
        with self._warning:
            draw_curves(read_table(self.table), self.path, self.loss)
        end = time.monotonic()
        self._next_time, self._is_due = end + (end - start) / SHARE, False

    def log_hyperparams(self, params, *args, **kwargs):
        """conf.yml has them."""


def read_table(path: Path) -> np.ndarray:
    """The rows of a metrics.csv, with its columns as fields; what is missing is NaN.

    Raises:
        OSError: it cannot be read.
    """
    return np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True, encoding="utf-8"))


def draw_curves(table: np.ndarray, path: Path, loss: str) -> None:
    """Writes a PNG with a panel each for the losses, whole-track SDR, learning rate and speed.

    A curve is omitted where it has no finite value, and a panel without curves.

    Args:
        table: as of `read_table`.
        loss: the label of the losses.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    names = {
        loss: {"train_loss": "training", "val_loss": "validation"},
        "SDR in dB": {n: n.removeprefix(SDR) for n in table.dtype.names if n.startswith(SDR)},
        "learning rate": {"lr": "lr"},
        SPEED: {"items_per_second": "training"},
    }
    panels = {label: find_curves(table, columns) for label, columns in names.items()}
    panels = {label: curves for label, curves in panels.items() if curves}
    figure = Figure(figsize=(8, 0.8 + 2 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    marker = "." if len(table) <= MOST_DOTS else ""
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, values in curves.items():
            axis.plot(table["epoch"], values, marker=marker, label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
        if "lr" in curves:
            axis.set_yscale("log")  # it is halved, and halved again
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        if label == SPEED:
            axis.set_ylim(0, 1.1 * np.nanmax(curves["training"]))
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if label_best := describe_best(table):
        figure.suptitle(label_best, fontsize="medium")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def find_curves(table: np.ndarray, columns: dict[str, str]) -> dict[str, np.ndarray]:
    """Label -> values, NaN where they are not finite, of the columns that have any other.

    Args:
        columns: name -> label.
    """
    found = {}
    for name, label in columns.items():
        if name in table.dtype.names and np.isfinite(table[name]).any():
            found[label] = np.where(np.isfinite(table[name]), table[name], np.nan)
    return found


def describe_best(table: np.ndarray) -> str:
    """The epoch with the least val_loss, which is that of best_model.pth; "" where there is none."""
    losses = find_curves(table, {"val_loss": "loss"}).get("loss")
    if losses is None:
        return ""
    best = np.nanargmin(losses)
    return f"least validation loss: {losses[best]:.6g}, in epoch {table['epoch'][best]:.0f}"
