"""The logs of a run: metrics.csv and TensorBoard, which a resumed run continues."""

import csv
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from local.tools.files import atomic_path


class ContinuedCSVLogger(CSVLogger):
    """Lightning's, which would delete metrics.csv when a run goes on.

    Args:
        before: what metrics.csv held where the run goes on; a kill may have torn the file itself.
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


def make_loggers(exp_dir: Path, point: dict | None) -> list:
    """For TensorBoard and metrics.csv; from a checkpoint on, if there is one."""
    step, metrics = (point["global_step"], point["so_far"]["metrics"]) if point else (0, "")
    # What a killed run logged later than that will be logged again.
    going_on = dict(purge_step=step, default_hp_metric=step == 0)
    # Ctrl-C within queue.put can leave the thread that writes asleep, and what waits for it at the
    # end with it: it wakes when it is time to flush.
    return [
        TensorBoardLogger(exp_dir, name="tensorboard", version="", flush_secs=1, **going_on),
        ContinuedCSVLogger(exp_dir, metrics),
    ]
