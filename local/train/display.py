"""What a run shows: a progress bar, a forecast, a line for every epoch, and how it ended."""

import math
import os
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress import ProgressBar as BaseProgressBar

from local.fast.choose import choose_fast
from local.streaming import find_stream_fault
from local.tools.command_line import plural
from local.tools.private import draw_bar_if
from local.tools.progress import Lines, has_bars, say
from local.train.checkpoints import list_last
from local.train.measure import measure_peak_memory, read_clock_after_device, reset_peak_memory


def describe_epoch(epoch: int, metrics: dict, seconds: float) -> str:
    line = (
        f"epoch {epoch}: train_loss {metrics['train_loss']:.6f},"
        f" val_loss {metrics['val_loss']:.6f}, lr {metrics['lr']:g},"
        f" {metrics['items_per_second']:.2f} items/s,"
        f" peak memory {metrics['peak_memory_gib']:.2f} GiB, {describe_time(seconds)}"
    )
    if skipped := int(metrics["skipped_steps"]):
        line += f"; {plural(skipped, 'step')} skipped, the gradients were not finite"
    return line


def describe_end(trainer: pl.Trainer) -> str:
    """Why training ended, and where the best model is."""
    stopper, steps = trainer.early_stopping_callback, plural(trainer.global_step, "step")
    if stopper is not None and stopper.stopped_epoch:
        why = f"stopped in epoch {stopper.stopped_epoch}: {stopper.stopping_reason_message}"
    elif trainer.global_step == trainer.lightning_module.config["training"]["max_steps"]:
        why = f"stopped after {steps} (--max_steps)"
    else:
        why = f"trained for {plural(trainer.current_epoch, 'epoch')}, {steps}"
    return f"{why}; {_describe_best(trainer)}"


def describe_early_end(trainer: pl.Trainer) -> str:
    """Where a run ended that did not finish, and how to resume it."""
    last = list_last(Path(trainer.checkpoint_callback.dirpath))
    how = f"resumes from {last[0]}" if last else "starts it again"
    return f"in epoch {trainer.current_epoch}; {_describe_best(trainer)}\nthe same command {how}"


def _describe_best(trainer: pl.Trainer) -> str:
    best = trainer.checkpoint_callback
    if best.exported_score is None:
        return "there is no best_model.pth yet: no epoch was finished"
    return f"best val_loss {best.exported_score:.6f}, in {best.exp_dir / 'best_model.pth'}"


def describe_time(seconds: float) -> str:
    """In seconds, minutes, hours or days, whichever is readable."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


class Forecast(pl.Callback):
    """Prints, after the first steps, the memory and time that the run will take.

    The first steps, which may compile, are not measured, the next few are. It waits for the device
    before and after those, and never again.
    """

    UNMEASURED = 2  # optimizer steps
    MEASURED = 4

    def on_train_start(self, trainer, pl_module):
        reset_peak_memory()
        batches = trainer.num_training_batches
        self._first = min(self.UNMEASURED * trainer.accumulate_grad_batches, batches // 2)
        self._last = min(self._first + self.MEASURED * trainer.accumulate_grad_batches, batches)
        self._batches = 0

    def on_train_epoch_start(self, trainer, pl_module):
        if self._batches < self._last:  # so that no validation comes between the batches
            self._batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._batches += 1
        if self._batches == self._first:
            self._start = read_clock_after_device(pl_module.device)
        elif self._first and self._batches == self._last:
            seconds = read_clock_after_device(pl_module.device) - self._start
            per_batch = seconds / (self._last - self._first)
            peak = measure_peak_memory(trainer)
            if trainer.is_global_zero:
                say(self._describe_memory(peak, pl_module))
                before = batch_idx + 1 - self._batches
                text = describe_rest(per_batch, before, trainer, pl_module.config["training"])
                measured = plural(self._last - self._first, "batch", "batches")
                say(f"{'time':<11}{text}, measured on {measured}, without validation")

    def _describe_memory(self, peak: float, system: pl.LightningModule) -> str:
        if system.device.type == "cuda":
            total, place = torch.cuda.mem_get_info(system.device)[1], "on each GPU"
        else:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            place = "in each process"
        measured = (
            f"{'memory':<11}{peak / 2**30:.2f} of {total / 2**30:.1f} GiB ({peak / total:.0%})"
            f" {place}, measured in training"
        )
        training = system.config["training"]
        is_fast = choose_fast(system.model, training["fast"], training=True)
        if training["valid_method"] != "full" or not is_fast:
            return measured
        track = max(system.val_loader.dataset.tracks, key=lambda track: track.length)
        validation = estimate_validation_memory(system, track.length)
        return (
            f"{measured}; about {validation / 2**30:.2f} GiB for the longest"
            f" validation track ({describe_time(track.seconds)}), not measured"
        )


def describe_rest(per_batch: float, before: int, trainer: pl.Trainer, training: dict) -> str:
    """How long an epoch takes, and what is to be done from the start of this process.

    Args:
        per_batch: seconds.
        before: batches of this epoch that were done before.
    """
    epoch, epochs = trainer.num_training_batches, training["epochs"] - trainer.current_epoch
    aggregate = training["aggregate"]
    steps = training["max_steps"] - trainer.current_epoch * -(-epoch // aggregate)
    steps -= before // aggregate
    more = "more " if trainer.current_epoch or before else ""
    limits = {}  # batches -> what they are
    if training["epochs"] > 0:
        limits[epoch * epochs - before] = plural(epochs, f"{more}epoch")
    if training["max_steps"] > 0:
        limits[steps * aggregate] = plural(steps, f"{more}step")
    text = f"{describe_time(per_batch * epoch)} per epoch"
    if not limits:
        return text
    return f"{text}, {describe_time(per_batch * min(limits))} for {limits[min(limits)]}"


def estimate_validation_memory(system: pl.LightningModule, samples: int) -> int:
    """Bytes that separate(model, track, "full") keeps for a track, with the fast path."""
    if not find_stream_fault(system.model):
        return 0
    sizes, training = system.config["convtasnet"], system.config["training"]
    product_bytes = 4 if training["precision"] == "32-true" else 2
    per_frame = 4 * sizes["B"] + product_bytes * max(sizes["B"], sizes["H"])
    return samples // (sizes["L"] // 2) * per_frame


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn twice a second; it reads the loss from the device at the log interval,
    or every ten seconds where steps are slow, which then takes next to no time.
    """

    DRAW, READ = 0.5, 10.0  # seconds

    def __init__(self):
        super().__init__()
        draw_bar_if(self, self._is_due)
        self._loss, self._draw_time, self._read_time = {}, -math.inf, -math.inf

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.on_train_epoch_start(trainer, pl_module)  # Lightning omits it within an epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        interval = trainer.log_every_n_steps * trainer.accumulate_grad_batches
        is_late = time.monotonic() - self._read_time > self.READ
        if self.is_enabled and (is_late or (batch_idx + 1) % interval == 0):
            self._loss = {"loss": trainer.logged_metrics["loss"].item()}
            self._read_time = time.monotonic()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    sanity_check_description = "Before the first step"

    def init_sanity_tqdm(self):
        with redirect_stdout(sys.stderr):
            return super().init_sanity_tqdm()

    def init_train_tqdm(self):
        with redirect_stdout(sys.stderr):  # Lightning draws on stdout, which may be a file
            return super().init_train_tqdm()

    def init_validation_tqdm(self):
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def on_exception(self, trainer, pl_module, exception):
        for bar in ("train_progress_bar", "val_progress_bar"):
            with suppress(TypeError):  # it has not been made yet
                getattr(self, bar).close()  # else it would be drawn once more, below the error
        super().on_exception(trainer, pl_module, exception)

    def get_metrics(self, trainer, pl_module):
        return {**self._loss, **super().get_metrics(trainer, pl_module)}

    def _is_due(self, current: int, total: int) -> bool:
        now = time.monotonic()
        if not self.is_enabled or (current != total and now - self._draw_time < self.DRAW):
            return False
        self._draw_time = now
        return True


class ProgressLines(BaseProgressBar):
    """At most a line a minute, with the loss, while an epoch is trained or validated."""

    _training = _validation = None
    _is_enabled = True

    def disable(self):  # Lightning disables it on all ranks but the first
        self._is_enabled = False

    def enable(self):
        self._is_enabled = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 or not self._training:  # a resumed run starts within an epoch
            title = f"epoch {trainer.current_epoch}: training"
            self._training = Lines(title, trainer.num_training_batches, "batches", n=batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._is_enabled:
            self._training.update(
                note=lambda: f"loss {trainer.logged_metrics['loss'].item():.6f}",
            )

    def on_validation_start(self, trainer, pl_module):
        when = f"epoch {trainer.current_epoch}"
        title = f"{'before the first step' if trainer.sanity_checking else when}: validation"
        self._validation = Lines(title, sum(trainer.num_val_batches), "tracks")

    def on_validation_batch_end(self, trainer, *args):
        if self._is_enabled:
            self._validation.update()


def make_progress() -> BaseProgressBar:
    return ProgressBar() if has_bars() else ProgressLines()
