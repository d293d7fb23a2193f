"""The logs of a run: metrics.csv and TensorBoard. A resumed run continues them."""

import csv
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from local.tools.files import atomic_path


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSVLogger deletes metrics.csv when a run is resumed; this one does not.

    Args:
        before: what metrics.csv held at the checkpoint that is resumed; a kill may have cut the
            file itself.
    """

    def __init__(self, exp_dir: Path, before: str = ""):
        super().__init__(exp_dir, name="logs", version="")
        self._before = before

    @property
    def experiment(self):
        writer = super().experiment
        if self._before and rank_zero_only.rank == 0:
            with atomic_path(Path(writer.metrics_file_path)) as temporary:
                temporary.write_bytes(self._before.encode())
            writer.metrics_keys = next(csv.reader([self._before.splitlines()[0]]))
            self._before = ""
        return writer


def make_loggers(exp_dir: Path, resumed=None) -> list:
    """For TensorBoard and metrics.csv.

    Args:
        resumed: as of `resume.find_resumed`.
    """
    step, metrics = (resumed.step, resumed.metrics) if resumed else (0, "")
    # What a killed run has logged after that step will be logged again.
    settings = dict(purge_step=step, default_hp_metric=step == 0)
    # Ctrl-C within queue.put can leave the thread that writes asleep, and so block the end of the
    # run, which waits for the thread: that wakes up when it has to flush.
    return [
        TensorBoardLogger(exp_dir, name="tensorboard", version="", flush_secs=1, **settings),
        ContinuedCSVLogger(exp_dir, metrics),
    ]
