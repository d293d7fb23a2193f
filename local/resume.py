"""Going on where a run ended: its last checkpoints, the settings it had, logs that go on with it.

A run that goes on computes what an undisturbed one would, to the last bit. With Lightning alone it
would not: that starts the items of an epoch anew in its middle, and forgets what it had summed up.
So a checkpoint is taken before a batch, when nothing of the one before is pending, and the system
and the sampler keep what Lightning does not.
"""

import csv
import re
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from local.checkpoint import atomic_path, save_atomically
from local.config import EVERY, UserError, brief, read_yaml

KEPT = 2
NAME = re.compile(r"last-epoch=(\d+)-step=(\d+)\.ckpt")
# What a run may have another value of and still compute the same.
FREE = {"root", "num_workers", "checkpoint_every", "exp_dir", "epochs", "max_skipped_steps"}


class LastCheckpoints(pl.Callback):
    """Checkpoints from which a run goes on: at the start of every epoch, in between, at the end.

    Args:
        every: such as "30 min" or "500 steps".
    """

    def __init__(self, folder: Path, every: str):
        amount, unit = re.fullmatch(EVERY, every).groups()
        self.folder, self.amount, self.in_minutes = folder, float(amount), unit == "min"

    def on_train_start(self, trainer, pl_module):
        self._saved_time = time.monotonic()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        at_step = batch_idx % trainer.accumulate_grad_batches == 0
        if batch_idx == 0 or at_step and self._is_due(trainer):
            checkpoint = self._make(trainer)
            loops = checkpoint["loops"]["fit_loop"]
            if batch_idx == 0:
                for progress in loops["epoch_progress"].values():  # the epoch has not begun
                    progress["ready"] = progress["started"] = progress["processed"]
            else:
                batches = loops["epoch_loop.batch_progress"]
                batches["is_last_batch"] = False
                for kind in ("total", "current"):  # nor has the batch
                    batches[kind]["ready"] = batches[kind]["started"]
            checkpoint["so_far"]["batches"] = batch_idx
            self._save(trainer, checkpoint)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning would leave ReduceLROnPlateau out at the end of an epoch that was gone on with.
        trainer.fit_loop.restarting = False

    def on_train_end(self, trainer, pl_module):
        stopper = trainer.early_stopping_callback
        checkpoint = self._make(trainer)
        checkpoint["so_far"]["batches"] = 0
        checkpoint["finished"] = {
            "epochs": trainer.current_epoch,
            "early": stopper is not None and bool(stopper.stopping_reason_message),
        }
        self._save(trainer, checkpoint)

    def _is_due(self, trainer) -> bool:
        if self.in_minutes:
            # The first rank decides: no two clocks are the same.
            late = time.monotonic() - self._saved_time >= 60 * self.amount
            return trainer.strategy.broadcast(late)
        return trainer.global_step % self.amount == 0

    def _make(self, trainer: pl.Trainer) -> dict:
        rows = 0
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, ContinuedCSVLogger):
                rows = logger.rows
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        checkpoint["so_far"] |= {"rows": rows, "devices": trainer.world_size}
        return checkpoint

    def _save(self, trainer: pl.Trainer, checkpoint: dict) -> None:
        if trainer.is_global_zero:
            epoch, step = checkpoint["epoch"], checkpoint["global_step"]
            self.folder.mkdir(exist_ok=True)
            save_atomically(checkpoint, self.folder / f"last-epoch={epoch}-step={step}.ckpt")
            for old in list_last(self.folder)[KEPT:]:
                old.unlink()
        self._saved_time = time.monotonic()


class ContinuedCSVLogger(CSVLogger):
    """Lightning's, which would delete metrics.csv when a run goes on.

    Args:
        kept: rows of metrics.csv that stay.
    """

    def __init__(self, exp_dir: Path, kept: int = 0):
        super().__init__(exp_dir, name="logs", version="")
        self.path, self.rows = exp_dir / "logs" / "metrics.csv", kept
        self._before = None
        # A run from another one's checkpoint has nothing to keep.
        if kept and rank_zero_only.rank == 0 and self.path.is_file():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._before = list(reader)[:kept], reader.fieldnames

    @property
    def experiment(self):
        writer = super().experiment
        if self._before:
            (rows, names), self._before = self._before, None
            with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
                table = csv.DictWriter(file, names)
                table.writeheader()
                table.writerows(rows)
            writer.metrics_keys = list(names)
        return writer

    @rank_zero_only
    def save(self):
        self.rows += len(self.experiment.metrics)
        super().save()


def list_last(folder: Path) -> list[Path]:
    """The last checkpoints in a folder, the newest first."""
    found = {}
    for path in folder.glob("last-*.ckpt"):
        if place := NAME.fullmatch(path.name):
            found[tuple(map(int, place.groups()))] = path
    return [found[place] for place in sorted(found, reverse=True)]


def load_last(folder: Path, set_aside: bool = True) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read; those that cannot are named, and set aside."""
    for path in list_last(folder):
        try:
            return path, load_point(path)
        except UserError as error:
            if rank_zero_only.rank == 0:
                print(f"warning: {error}; set aside, going on with the one before it")
            if rank_zero_only.rank == 0 and set_aside:
                path.rename(path.with_suffix(".damaged"))
    return None


def load_point(path: Path) -> dict:
    """A checkpoint of `LastCheckpoints`.

    Raises:
        UserError: it is damaged, or another kind.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["so_far"]["rows"]
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise UserError(f"{path}: no checkpoint to go on from: {brief(error)}") from None
    return checkpoint


def find_changes(conf: dict, exp_dir: Path) -> list[str]:
    """The settings by which a run would not be the one in exp_dir, a line each."""
    if not (exp_dir / "conf.yml").is_file():
        return []
    before = read_yaml(exp_dir / "conf.yml")
    return [
        f"--{key}: {before.get(section, {}).get(key)} before, {value} now"
        for section, keys in conf.items()
        for key, value in keys.items()
        if key not in FREE and before.get(section, {}).get(key) != value
    ]


def record_changes(exp_dir: Path, changes: list[str], checkpoint: dict) -> None:
    """Adds to EXP/changes.yml what was changed, and from which epoch and step on."""
    place = {"epoch": checkpoint["epoch"], "step": checkpoint["global_step"]}
    with (exp_dir / "changes.yml").open("a", encoding="utf-8") as file:
        yaml.safe_dump([{**place, "changes": changes}], file, allow_unicode=True, sort_keys=False)
