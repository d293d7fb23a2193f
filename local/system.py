"""asteroid's System for this recipe: the loss, what is logged, what is kept."""

import math
import time

import torch
from asteroid.engine.system import System

from local.fast.choose import choose_forward
from local.inference import separate
from local.tools.command_line import UserError
from local.tools.random_states import get_random_states, set_random_states
from local.train.display import describe_epoch, gather_peak_memory, wait_and_look_at_clock
from local.train.loaders import count_batches
from local.train.recipe import describe_objects, keep_edits


class MusicSystem(System):
    """Trains on segments, validates on whole tracks.

    Logs loss at the log interval, and at every epoch train_loss (its mean), val_loss, lr,
    items_per_second over all devices, peak_memory_gib of the process that took most, and
    skipped_steps, those whose gradients were not finite. With a fused optimizer no training step
    waits for the device; any other is told by this process to skip a step. The sampler of the
    training items must be an EpochSampler.
    """

    _so_far = None  # of a checkpoint from which the run goes on

    def on_fit_start(self):
        training = self.config["training"]
        self._separate_segments, note = choose_forward(self.model, training, self.device)
        if note and self.trainer.is_global_zero:
            print(f"compile    {note}", flush=True)  # there is no bar yet for self.print to go by

    def common_step(self, batch, batch_nb, train=True):
        """The loss of a batch of (mixture, targets): (M, 2, T), (M, C, 2, T).

        Raises:
            UserError: the model gives estimates of another shape than the targets.
        """
        mixtures, targets = batch
        if train:
            estimates = self._separate_segments(mixtures)
        else:
            training = self.config["training"]
            estimates = torch.stack(
                [
                    separate(self.model, mixture, training["valid_method"], fast=training["fast"])
                    for mixture in mixtures
                ]
            )
        if estimates.shape != targets.shape:
            raise UserError(
                f"{type(self.model).__name__} gives {tuple(estimates.shape)} for mixtures of"
                f" {tuple(mixtures.shape)}; the targets are {tuple(targets.shape)}"
            )
        return self.loss_func(estimates, targets)

    def training_step(self, batch, batch_nb):
        """Logs the loss of a batch and returns it."""
        loss = self.common_step(batch, batch_nb, train=True)
        # Not with prog_bar: Lightning would read it at every step.
        self.log("loss", loss)
        self._loss_sum += len(batch[0]) * loss.detach()
        return loss

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        """Clips the norm of the gradients; where it is not finite, the step will be skipped."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # Lightning leaves this to the fused step, too late for the norm
            scaler.unscale_(optimizer)
        limit = gradient_clip_val or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        is_skipped = (~norm.isfinite()).float()
        self._skipped += is_skipped
        self._skipped_in_a_row = (self._skipped_in_a_row + 1) * is_skipped
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = is_skipped  # read by the fused kernel, on the device
        elif is_skipped:  # any optimizer passes over parameters without a gradient
            optimizer.zero_grad(set_to_none=True)

    def on_save_checkpoint(self, checkpoint):
        """Adds what is summed up in an epoch, and the states of random numbers."""
        super().on_save_checkpoint(checkpoint)
        own = {"loss_sum": self._loss_sum.cpu(), "random": get_random_states(self.device)}
        ranks = [own] * self.trainer.world_size
        if len(ranks) > 1:
            torch.distributed.all_gather_object(ranks, own)
        checkpoint["so_far"] = {
            "ranks": ranks,
            "items": self._items,
            "steps_before": self._steps_before,
            "skipped": self._skipped.cpu(),
            "skipped_in_a_row": self._skipped_in_a_row.cpu(),
        }

    def on_load_checkpoint(self, checkpoint):
        """Goes on within the epoch that the checkpoint is from, with the objects that are there
        now: what train.py makes them of comes before what they were made of.
        """
        so_far = checkpoint.get("so_far", {})
        if "metrics" in so_far:  # those of LastCheckpoints alone can be gone on from exactly
            self._so_far = so_far
            batches = count_batches(self.config, so_far["items"], self.trainer.world_size)
            start = batches * self.train_loader.batch_size
            self.train_loader.sampler.go_on(checkpoint["epoch"], start)
            if batches:  # they may be of another size now
                progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
                progress["current"] = dict.fromkeys(progress["current"], batches)
            keep_edits(checkpoint, describe_objects(self, self.trainer))
        current = self.optimizer.param_groups[0]
        own = {name: current[name] for name in ("fused", "foreach") if name in current}
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                group.update(own)

    def on_train_start(self):
        self._skipped_in_a_row = torch.zeros((), device=self.device)
        self._start_epoch()
        if so_far := self._so_far:
            self._items = self._items_before = so_far["items"]
            self._steps_before = so_far["steps_before"]
            # Of all ranks that there were, where there are fewer now.
            for before in so_far["ranks"][self.global_rank :: self.trainer.world_size]:
                self._loss_sum += before["loss_sum"].to(self.device)
                set_random_states(before["random"], self.device)
            self._skipped = so_far["skipped"].to(self.device)
            self._skipped_in_a_row = so_far["skipped_in_a_row"].to(self.device)

    def on_train_epoch_start(self):
        self._start_epoch()

    def _start_epoch(self):
        self._epoch_start = time.perf_counter()
        self._items = self._items_before = 0  # all of the epoch; those before it was gone on with
        self._steps_before = self.trainer.global_step
        self._skipped = torch.zeros((), device=self.device)
        self._loss_sum = torch.zeros((), device=self.device)  # over the items of this rank

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._items += len(batch[0]) * self.trainer.world_size
        max_steps = self.config["training"]["max_steps"]
        if 0 < max_steps <= self.trainer.global_step:
            # Lightning's own max_steps would end the run without a validation, so without a model.
            self.trainer.should_stop = True
        interval = self.trainer.log_every_n_steps * self.trainer.accumulate_grad_batches
        if (batch_idx + 1) % interval == 0:
            self._refuse_to_stand_still(self.config["training"]["max_skipped_steps"])
        if self.trainer.is_last_batch or self.trainer.should_stop:
            self._training_seconds = wait_and_look_at_clock(self.device) - self._epoch_start

    def on_validation_epoch_start(self):
        self._val_sum = torch.zeros(2, device=self.device)  # of the losses, and how many
        self._release_cached_memory()

    def validation_step(self, batch, batch_nb):
        """Adds the loss of a whole track."""
        loss = self.common_step(batch, batch_nb, train=False)
        self._val_sum += torch.stack([loss, torch.ones_like(loss)])

    def on_validation_epoch_end(self):
        """Logs val_loss, the mean over the tracks of all ranks; ranks may have unequal shares."""
        self._release_cached_memory()
        total, count = self.trainer.strategy.reduce(self._val_sum, reduce_op="sum")
        val_loss = total / count
        if not val_loss.isfinite():
            raise UserError(
                f"val_loss of epoch {self.trainer.current_epoch} is not finite: the model has"
                " diverged, and nothing of this epoch is kept; try a lower --lr"
            )
        self.log("val_loss", val_loss, prog_bar=True, sync_dist=True, batch_size=1)
        if self.trainer.logger is not None:
            metrics = {"hp_metric": val_loss.item()}
            self.trainer.logger.log_metrics(metrics, step=self.trainer.global_step - 1)

    def _release_cached_memory(self):
        """Training and validation need blocks of other sizes: one does not keep the other's."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def on_train_epoch_end(self):
        """Logs what the epoch took and prints its line."""
        steps = self.trainer.global_step - self._steps_before
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:  # one first looks for its scale, and skips steps until it has it
            self._refuse_to_stand_still(max(steps, 1))
        loss_sum = self.trainer.strategy.reduce(self._loss_sum, reduce_op="sum")
        metrics = {
            "train_loss": loss_sum / self._items,
            "lr": self.optimizer.param_groups[0]["lr"],
            "items_per_second": (self._items - self._items_before) / self._training_seconds,
            "peak_memory_gib": gather_peak_memory(self.trainer) / 2**30,
            "skipped_steps": self._skipped.item(),
        }
        for name, value in metrics.items():
            self.log(name, value, sync_dist=True)
        seconds = time.perf_counter() - self._epoch_start
        metrics["val_loss"] = self.trainer.callback_metrics["val_loss"]
        self.print(describe_epoch(self.trainer.current_epoch, metrics, seconds))

    def _refuse_to_stand_still(self, most: int):
        """Raises a UserError where the last `most` steps, or more, had no finite gradients."""
        skipped = int(self._skipped_in_a_row)
        if skipped < most:
            return
        # Those of an earlier epoch are gone by now.
        first = max(self.trainer.global_step - self._steps_before - skipped, 0)
        in_a_step = self.trainer.accumulate_grad_batches * self.train_loader.batch_size
        items = self.train_loader.sampler.find_items(first * in_a_step, (first + 1) * in_a_step)
        epoch, seed = self.trainer.current_epoch, self.config["training"]["seed"]
        raise UserError(
            f"no step of the last {skipped} had finite gradients; they were skipped, and the model"
            f" is as before. The first of them in epoch {epoch} was of items"
            f" {', '.join(map(str, items))} (--seed {seed}). Try a lower --lr, or --precision"
            " 32-true"
        )
