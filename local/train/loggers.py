"""The logs of a run: metrics.csv, TensorBoard and curves.png. A resumed run continues them."""

import csv
import io
from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from local.tools.files import atomic_path
from local.train.curves import Curves

# The first columns of metrics.csv; whatever else is logged follows them.
COLUMNS = ("epoch", "step", "train_loss", "val_loss")
PLAIN = (bool, int, float, str)
BY_STEP = {"loss", "hp_metric"}  # columns of an earlier version, which had several rows an epoch


class EpochTable(Logger):
    """metrics.csv: a row for every epoch that is finished, with all that is logged of it.

    What is logged of a batch is left to TensorBoard. The file is written anew for every row, so
    that no reader and no kill meets half of one.

    Args:
        before: what metrics.csv held at the checkpoint that is resumed. Of an earlier version it
            is converted; `loss` at intervals goes to metrics_by_step.csv then.
    """

    name, version = "metrics.csv", ""

    def __init__(self, path: Path, before: str = ""):
        super().__init__()
        self.path, self._before, self._has_begun = path, before, False
        self._rows, self._row = read_epochs(before), {}

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        if "loss" in metrics:
            return
        self._row |= {**metrics, "step": step}
        if "train_loss" in metrics:  # which is logged last, see EpochStatistics
            self._rows[int(metrics["epoch"])], self._row = self._row, {}
            self._write()

    @rank_zero_only
    def save(self):
        """When the run starts, drops the rows that a killed run has added after the checkpoint."""
        if self._has_begun:
            return
        self._has_begun = True
        if BY_STEP & set(self._before.partition("\n")[0].strip().split(",")):
            self.path.parent.mkdir(exist_ok=True)
            with atomic_path(self.path.with_name("metrics_by_step.csv")) as temporary:
                temporary.write_bytes(self._before.encode())
        if self._rows:
            self._write()
        else:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        found = dict.fromkeys(name for row in self._rows.values() for name in row)
        names = [*COLUMNS, *sorted(found.keys() - set(COLUMNS))]
        with io.StringIO(newline="") as text:
            writer = csv.DictWriter(text, names)
            writer.writeheader()
            writer.writerows(self._rows.values())
            content = text.getvalue()
        self.path.parent.mkdir(exist_ok=True)
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(content.encode())

    def log_hyperparams(self, params, *args, **kwargs):
        """conf.yml has them."""


def read_epochs(text: str) -> dict[int, dict]:
    """Epoch -> its row in a metrics.csv. The rows of an earlier version are merged."""
    rows = {}
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if row["epoch"]:
            found = {name: value for name, value in row.items() if value and name not in BY_STEP}
            rows.setdefault(int(row["epoch"]), {}).update(found)
    return {epoch: row for epoch, row in rows.items() if "train_loss" in row}


class TensorBoard(TensorBoardLogger):
    """Lightning's logger shows settings beside a metric of its own, hp_metric; this one shows them
    beside val_loss.
    """

    @rank_zero_only
    def log_hyperparams(self, params, metrics=None, step=None):
        super().log_hyperparams(params, metrics, step)
        plain = {
            name: value if isinstance(value, PLAIN) else str(value)
            for name, value in params.items()
        }
        for summary in hparams(plain, {"val_loss": 0.0}):  # the name; its values are logged anyway
            self.experiment.file_writer.add_summary(summary)


def make_loggers(conf: dict, resumed=None) -> list:
    """For TensorBoard, metrics.csv and curves.png.

    Args:
        resumed: as of `resume.find_resumed`.
    """
    exp_dir = Path(conf["main_args"]["exp_dir"])
    step, metrics = (resumed.step, resumed.metrics) if resumed else (0, "")
    # What a killed run has logged after that step will be logged again.
    settings = dict(purge_step=step, default_hp_metric=False)
    # Ctrl-C within queue.put can leave the thread that writes asleep, and so block the end of the
    # run, which waits for the thread: that wakes up when it has to flush.
    return [
        TensorBoard(exp_dir, name="tensorboard", version="", flush_secs=1, **settings),
        EpochTable(exp_dir / "logs" / "metrics.csv", metrics),
        Curves(exp_dir, conf["training"]["loss"]),
    ]
