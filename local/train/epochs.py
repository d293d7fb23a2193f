"""Callbacks for the epochs of a run: statistics, gradients, skipped steps, when training ends."""

import time

import pytorch_lightning as pl
import torch

from local.tools.command_line import UserError
from local.tools.progress import report
from local.train.display import describe_epoch
from local.train.measure import measure_peak_memory, read_clock_after_device
from local.train.ranks import gather_from_ranks


class EpochStatistics(pl.Callback):
    """Logs of every epoch train_loss (the mean over its items), lr, items_per_second over all
    devices, and peak_memory_gib of the process that took most; prints the line of the epoch.

    What is summed within an epoch is kept in checkpoints, for every rank.
    """

    _resumed = None  # the state in the checkpoint that is resumed
    _start = 0.0

    def state_dict(self) -> dict:
        return {
            "loss_sums": gather_from_ranks(self._loss_sum.cpu()),
            "items": self._items,
        }

    def load_state_dict(self, state_dict):
        self._resumed = state_dict

    def on_train_start(self, trainer, pl_module):
        self.on_train_epoch_start(trainer, pl_module)
        if state := self._resumed:
            self._items = self._items_resumed = state["items"]
            # There may be fewer ranks now than there were.
            for loss_sum in state["loss_sums"][trainer.global_rank :: trainer.world_size]:
                self._loss_sum += loss_sum.to(pl_module.device)

    def on_train_epoch_start(self, trainer, pl_module):
        self._start = time.perf_counter()
        self._items = self._items_resumed = 0  # of the epoch; those of them before it was resumed
        self._loss_sum = torch.zeros((), device=pl_module.device)  # over the items of this rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        items = len(batch[0])
        # Lightning has divided the loss, for gradients that are accumulated.
        self._loss_sum += items * outputs["loss"] * trainer.accumulate_grad_batches
        self._items += items * trainer.world_size

    def on_validation_start(self, trainer, pl_module):
        self._training_seconds = read_clock_after_device(pl_module.device) - self._start

    def on_validation_end(self, trainer, pl_module):
        val_loss = trainer.callback_metrics["val_loss"]
        if not val_loss.isfinite() and trainer.sanity_checking:
            raise UserError("--init: val_loss with its weights is not finite; name other weights")
        if not val_loss.isfinite():
            raise UserError(
                f"val_loss of epoch {trainer.current_epoch} is not finite: the model has diverged,"
                " and nothing of this epoch is kept; try a lower --lr"
            )

    def on_train_epoch_end(self, trainer, pl_module):
        loss_sum = trainer.strategy.reduce(self._loss_sum, reduce_op="sum")
        metrics = {
            "train_loss": loss_sum / self._items,
            "lr": pl_module.optimizer.param_groups[0]["lr"],
            "items_per_second": (self._items - self._items_resumed) / self._training_seconds,
            "peak_memory_gib": measure_peak_memory(trainer) / 2**30,
        }
        pl_module.log_dict(metrics, sync_dist=True)
        metrics = {**trainer.callback_metrics, **metrics}
        seconds = time.perf_counter() - self._start
        if trainer.is_global_zero:
            report(describe_epoch(trainer.current_epoch, metrics, seconds))


class GradientNorms(pl.Callback):
    """Logs grad_norm and grad_norm_max of every epoch, before clipping: mean and maximum over its
    optimizer steps, without those that were skipped. Nothing is read from the device before.
    """

    _resumed = None

    def state_dict(self) -> dict:
        return {"sum": self._sum.cpu(), "steps": self._steps.cpu(), "max": self._max.cpu()}

    def load_state_dict(self, state_dict):
        self._resumed = state_dict

    def on_train_start(self, trainer, pl_module):
        self.on_train_epoch_start(trainer, pl_module)
        if state := self._resumed:
            self._sum, self._steps, self._max = (
                state[name].to(pl_module.device) for name in ("sum", "steps", "max")
            )

    def on_train_epoch_start(self, trainer, pl_module):
        self._sum, self._steps, self._max = torch.zeros(3, device=pl_module.device).unbind()

    def on_train_batch_end(self, trainer, pl_module, *args):
        norm, pl_module.grad_norm = pl_module.grad_norm, None
        if norm is None:  # no step yet: gradients are accumulated
            return
        is_finite = norm.isfinite()
        norm = torch.where(is_finite, norm, 0)
        self._sum = self._sum + norm
        self._steps = self._steps + is_finite
        self._max = torch.maximum(self._max, norm)

    def on_train_epoch_end(self, trainer, pl_module):
        norms = {"grad_norm": self._sum / self._steps, "grad_norm_max": self._max}
        pl_module.log_dict(norms, sync_dist=True)


class SkippedSteps(pl.Callback):
    """Logs skipped_steps of every epoch, those whose gradients were not finite; ends a run in which
    a number of them follow one another.

    Args:
        most: that number.

    The sampler of the training items must be an EpochSampler.
    """

    _resumed = None

    def __init__(self, most: int):
        self.most = most

    def state_dict(self) -> dict:
        return {
            "skipped": self._skipped.cpu(),
            "in_a_row": self._in_a_row.cpu(),
            "steps_before": self._steps_before,
        }

    def load_state_dict(self, state_dict):
        self._resumed = state_dict

    def on_train_start(self, trainer, pl_module):
        self._in_a_row = torch.zeros((), device=pl_module.device)
        self.on_train_epoch_start(trainer, pl_module)
        self._step = trainer.global_step
        if state := self._resumed:
            self._steps_before = state["steps_before"]
            self._skipped = state["skipped"].to(pl_module.device)
            self._in_a_row = state["in_a_row"].to(pl_module.device)

    def on_train_epoch_start(self, trainer, pl_module):
        self._steps_before = trainer.global_step
        self._skipped = torch.zeros((), device=pl_module.device)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._skipped = self._skipped + pl_module.step_skipped
            self._in_a_row = (self._in_a_row + 1) * pl_module.step_skipped
        interval = trainer.log_every_n_steps * trainer.accumulate_grad_batches
        if (batch_idx + 1) % interval == 0:
            self._end_if_all_skipped(trainer, pl_module, self.most)

    def on_train_epoch_end(self, trainer, pl_module):
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            # A scaler skips steps until it has found its scale.
            steps = trainer.global_step - self._steps_before
            self._end_if_all_skipped(trainer, pl_module, max(steps, 1))
        pl_module.log("skipped_steps", self._skipped, sync_dist=True)

    def _end_if_all_skipped(self, trainer, system, most: int) -> None:
        """Raises a UserError if the last `most` steps, or more, were skipped."""
        skipped = int(self._in_a_row)
        if skipped < most:
            return
        # The items of an earlier epoch can no longer be named.
        first = max(trainer.global_step - self._steps_before - skipped, 0)
        in_a_step = trainer.accumulate_grad_batches * system.train_loader.batch_size
        items = system.train_loader.sampler.find_items(first * in_a_step, (first + 1) * in_a_step)
        raise UserError(
            f"no step of the last {skipped} had finite gradients; they were skipped, and the model"
            f" is as before. The first of them in epoch {trainer.current_epoch} was of items"
            f" {', '.join(map(str, items))} (--seed {system.config['training']['seed']}). Try a"
            " lower --lr, or --precision 32-true"
        )


class StopAtMaxSteps(pl.Callback):
    """Ends training after `max_steps` optimizer steps, with a validation, and so with a model;
    Lightning's own max_steps ends without.
    """

    def __init__(self, max_steps: int):
        self.max_steps = max_steps

    def on_train_batch_end(self, trainer, *args):
        if 0 < self.max_steps <= trainer.global_step:
            trainer.should_stop = True


class FreeCachedMemory(pl.Callback):
    """Frees the GPU memory that is held for later, between training and validation: they need
    blocks of other sizes.
    """

    def on_validation_start(self, trainer, pl_module):
        if pl_module.device.type == "cuda":
            pl_module.free_memory()

    on_validation_end = on_validation_start
