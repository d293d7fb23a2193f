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
RATE, SPEED = "learning rate", "items per second"
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
        self.label = f"{loss} loss in dB" if is_in_decibels else f"{loss} loss"
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
        with self._warning, atomic_path(self.path) as temporary:
            plot_curves(read_table(self.table), self.label).savefig(temporary, format="png")
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


def plot_curves(table: np.ndarray, loss: str):
    """A matplotlib figure with a panel each for losses, whole-track SDR, learning rate and speed.

    A curve is omitted where it has no finite value, and a panel without curves.

    Args:
        table: as of `read_table`.
        loss: the label of the losses.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = {
        loss: {"train_loss": "training", "val_loss": "validation"},
        "SDR in dB": {n: n.removeprefix(SDR) for n in table.dtype.names if n.startswith(SDR)},
        RATE: {"lr": RATE},
        SPEED: {"items_per_second": SPEED},
    }
    found = {label: find_curves(table, names) for label, names in columns.items()}
    found = {label: curves for label, curves in found.items() if curves}
    figure = Figure(figsize=(8, 0.8 + 2 * len(found)), dpi=120, layout="constrained")
    panels = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
    for panel, (label, curves) in zip(panels, found.items(), strict=True):
        plot_panel(panel, table["epoch"], label, curves)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(describe_best(table), fontsize="medium")
    return figure


def plot_panel(panel, epochs: np.ndarray, label: str, curves: dict[str, np.ndarray]) -> None:
    from matplotlib.ticker import LogLocator

    marker = "." if len(epochs) <= MOST_DOTS else ""
    for name, values in curves.items():
        panel.plot(epochs, values, marker=marker, label=name)
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
    if len(curves) > 1:
        panel.legend()
    if label == RATE:
        panel.set_yscale("log")  # it is halved, and halved again
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    if label == SPEED:
        panel.set_ylim(0, 1.1 * np.nanmax(curves[SPEED]))


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
    """Which epoch has the least val_loss, and so is best_model.pth; "" where there is none."""
    losses = find_curves(table, {"val_loss": "loss"}).get("loss")
    if losses is None:
        return ""
    best = np.nanargmin(losses)
    return f"least validation loss: {losses[best]:.6g}, in epoch {table['epoch'][best]:.0f}"
