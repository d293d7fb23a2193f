"""asteroid's System for this recipe: loss, training step, validation, gradient clipping."""

import math

import torch
from asteroid.engine.system import System
from torch import Tensor

from local.fast.choose import choose_forward
from local.fast.graphed import give_back_memory
from local.inference import separate
from local.musdb18_tracks import SOURCES, TARGETS
from local.sdr import sum_sdr
from local.tools.command_line import UserError
from local.tools.progress import say


class MusicSystem(System):
    """Trains on segments, validates on whole tracks.

    Logs `loss` of the batches at the log interval, and of an epoch `val_loss` and `val_sdr_TARGET`,
    means over the tracks of all ranks. Everything else that a run does is done by the callbacks in
    local/train. No training step waits for the device, unless the optimizer is not fused, or
    with --ema.
    """

    # Of the last optimizer step, on the device.
    grad_norm = None  # before it was clipped
    step_skipped = None  # 1 if that was not finite, else 0
    _sdr_sum = 0  # see `sum_sdr`
    _estimates = None  # of a validation batch, until its step ends

    @staticmethod
    def config_to_hparams(dic):
        """As asteroid's, which makes tensors of lists, and cannot of a list of roots."""
        text = {
            section: {key: str(v) if isinstance(v, list) else v for key, v in keys.items()}
            for section, keys in dic.items()
        }
        return System.config_to_hparams(text)

    def on_fit_start(self):
        training = self.config["training"]
        self._separate_segments, note = choose_forward(self.model, training, self.device)
        if note and self.trainer.is_global_zero:
            say(f"compile    {note}")

    def free_memory(self) -> None:
        """Gives back the GPU memory that training holds between its steps."""
        give_back_memory(self._separate_segments)

    def common_step(self, batch, batch_nb, train=True):
        """The loss of a batch of (mixtures, targets): (M, 2, T), (M, C, 2, T).

        Raises:
            UserError: the estimates have another shape than the targets.
        """
        mixtures, targets = batch
        estimates = self._separate_segments(mixtures) if train else self._separate_tracks(mixtures)
        if estimates.shape != targets.shape:
            raise UserError(
                f"{type(self.model).__name__} gives {tuple(estimates.shape)} for mixtures of"
                f" {tuple(mixtures.shape)}; the targets are {tuple(targets.shape)}"
            )
        if not train:
            self._sdr_sum += sum_sdr(estimates, targets)
            self._estimates = estimates
        return self.loss_func(estimates, targets)

    def _separate_tracks(self, mixtures: Tensor) -> Tensor:
        method, fast = (self.config["training"][key] for key in ("valid_method", "fast"))
        return torch.stack([separate(self.model, x, method, fast=fast) for x in mixtures])

    def training_step(self, batch, batch_nb):
        loss = self.common_step(batch, batch_nb, train=True)
        self.log("loss", loss)  # with prog_bar, Lightning would wait for the device at every step
        return loss

    def on_validation_epoch_start(self):
        self._val_sum = torch.zeros(2, device=self.device)  # of the losses, and how many
        self.targets = TARGETS if self.config["data"]["mix_background"] else SOURCES
        self._sdr_sum = torch.zeros(2, len(self.targets), device=self.device)

    def validation_step(self, batch, batch_nb):
        """Gives callbacks the estimates, (M, C, 2, T)."""
        loss = self.common_step(batch, batch_nb, train=False)
        self._val_sum += torch.stack([loss, torch.ones_like(loss)])
        estimates, self._estimates = self._estimates, None
        return estimates

    def on_validation_epoch_end(self):
        # Lightning's own mean is wrong where ranks have unequal numbers of tracks.
        total, count = self.trainer.strategy.reduce(self._val_sum, reduce_op="sum")
        self.log("val_loss", total / count, prog_bar=True, sync_dist=True, batch_size=1)
        totals, counts = self.trainer.strategy.reduce(self._sdr_sum, reduce_op="sum")
        for target, sdr in zip(self.targets, totals / counts, strict=True):
            self.log(f"val_sdr_{target}", sdr, sync_dist=True, batch_size=1)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        """Clips the norm of the gradients; skips the step if the norm is not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # a fused step unscales by itself, which is too late for the norm
            scaler.unscale_(optimizer)
        limit = gradient_clip_val or math.inf
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.step_skipped = (~self.grad_norm.isfinite()).float()
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = self.step_skipped  # the fused kernel reads it on the device
        elif self.step_skipped:  # optimizers skip parameters that have no gradient
            optimizer.zero_grad(set_to_none=True)
