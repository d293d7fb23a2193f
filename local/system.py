"""asteroid's System for this recipe: the loss, what is logged, what is kept."""

import json
import time
from pathlib import Path

import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from local.checkpoint import atomic_path, save_best_model
from local.config import import_asteroid
from local.inference import separate

System = import_asteroid("asteroid.engine.system").System


class MusicSystem(System):
    """Trains on segments, validates on whole tracks.

    Logs loss at every step, and at every epoch train_loss (its mean), val_loss, lr and
    items_per_second over all devices.
    """

    def common_step(self, batch, batch_nb, train=True):
        """The loss of a batch of (mixture, targets): (M, 2, T), (M, C, 2, T); whole tracks go
        through the model in tiles, to the same numbers.
        """
        if train:
            return super().common_step(batch, batch_nb, train)
        mixtures, targets = batch
        estimates = torch.stack([separate(self.model, mixture, "full") for mixture in mixtures])
        return self.loss_func(estimates, targets)

    def training_step(self, batch, batch_nb):
        """Logs the loss of a batch and returns it."""
        loss = self.common_step(batch, batch_nb, train=True)
        self.log("loss", loss, prog_bar=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_validation_epoch_start(self):
        self._val_sum = torch.zeros(2, device=self.device)  # of the losses, and how many

    def validation_step(self, batch, batch_nb):
        """Adds the loss of a whole track."""
        loss = self.common_step(batch, batch_nb, train=False)
        self._val_sum += torch.stack([loss, torch.ones_like(loss)])

    def on_validation_epoch_end(self):
        """Logs val_loss, the mean over the tracks of all ranks; ranks may have unequal shares."""
        total, count = self.trainer.strategy.reduce(self._val_sum, reduce_op="sum")
        val_loss = total / count
        self.log("val_loss", val_loss, prog_bar=True, sync_dist=True, batch_size=1)
        if self.trainer.logger is not None:
            metrics = {"hp_metric": val_loss.item()}
            self.trainer.logger.log_metrics(metrics, step=self.trainer.global_step)

    def on_train_epoch_start(self):
        self._epoch_start = self._last_step = time.perf_counter()
        self._items = 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._items += len(batch[0]) * self.trainer.world_size
        self._last_step = time.perf_counter()
        max_steps = self.config["training"]["max_steps"]
        if 0 < max_steps <= self.trainer.global_step:
            # Lightning's own max_steps would end the run without a validation, so without a model.
            self.trainer.should_stop = True

    def on_train_epoch_end(self):
        seconds = self._last_step - self._epoch_start
        self.log("items_per_second", self._items / seconds, rank_zero_only=True)
        self.log("lr", self.optimizer.param_groups[0]["lr"], rank_zero_only=True)


class BestCheckpoints(ModelCheckpoint):
    """The ten best checkpoints by val_loss; best_model.pth and best_k_models.json follow them."""

    def __init__(self, exp_dir: Path):
        super().__init__(
            exp_dir / "checkpoints",
            monitor="val_loss",
            mode="min",
            save_top_k=10,
            save_on_train_epoch_end=True,
        )
        self.exp_dir = exp_dir
        self._exported = ""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        scores = {
            f"checkpoints/{Path(path).name}": score.item()
            for path, score in self.best_k_models.items()
        }
        with atomic_path(self.exp_dir / "best_k_models.json") as temporary:
            temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        if self.best_model_path != self._exported:
            save_best_model(self.exp_dir / "best_model.pth", pl_module.model, pl_module.config)
            self._exported = self.best_model_path
