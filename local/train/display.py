"""What a person sees of a run: what it is, its bar, a forecast, a line per epoch, its end."""

import math
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar

from local.fast.equal import choose_fast, describe_fast
from local.fast.recompute import find_recomputed
from local.musdb18_dataset import SegmentDataset, TrackDataset
from local.streaming import find_stream_fault
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import plural
from local.train.checkpoints import list_last
from local.train.loaders import count_batches
from local.train.preflight import describe_disk, describe_versions
from local.train.recipe import describe_object, describe_optimizer, list_schedules


def describe_run(system: pl.LightningModule, trainer: pl.Trainer) -> str:
    """What will be trained on what, for the first screen.

    Raises:
        ValueError: `--fast yes`, and the fast formulas differ from the model.
    """
    conf = system.config
    training, data = conf["training"], conf["data"]
    train_set, valid_set = system.train_loader.dataset, system.val_loader.dataset
    exp_dir = Path(conf["main_args"]["exp_dir"])
    batches = count_batches(conf, len(train_set), trainer.world_size)
    parameters = sum(parameter.numel() for parameter in system.model.parameters())
    stopper = trainer.early_stopping_callback
    early = f", or {describe_object(stopper)}" if stopper else ""
    how = "whole" if training["valid_method"] == "full" else f"by {training['valid_method']}"
    rows = {
        "model": f"{describe_model(system.model)}, {parameters:,} parameters,"
        f" {data['sample_rate']} Hz",
        "runs as": describe_fast(system.model, training["fast"], training=True),
        "training": f"{_tracks(train_set)}, in random segments of {data['segment']} s",
        "validation": f"{_tracks(valid_set)}, {how}",
        "data": data["root"],
        "epoch": f"{len(train_set)} items = {plural(batches, 'batch', 'batches')} of"
        f" {training['batch_size']} per device,"
        f" {plural(training['aggregate'], 'batch', 'batches')} to an optimizer step",
        "end": f"after {plural(training['epochs'], 'epoch')}{early}",
        "loss": describe_object(system.loss_func),
        "optimizer": f"{describe_optimizer(system.optimizer)}; seed {training['seed']}",
        "schedule": ", ".join(map(describe_object, list_schedules(system))) or "none",
        "devices": f"{_devices(trainer)}, precision {training['precision']},"
        f" memory {training['memory']}, compile {training['compile']}",
        "versions": describe_versions(),
        "output": f"{exp_dir}, {describe_disk(exp_dir, parameters)}",
    }
    if not choose_fast(system.model, training["fast"], training=True):
        note = find_recomputed(system.model, training["memory"])[1]
        rows["runs as"] += f"; {note}" if note else ""
    return "\n".join(f"{name:<11}{text}" for name, text in rows.items())


def describe_model(model: torch.nn.Module) -> str:
    name = type(model).__name__
    if not isinstance(model, ConvTasNetStereo):
        return name
    return f"{name}, {'causal' if model.causal else 'non-causal'}, {model.norm_type}"


def _tracks(dataset: SegmentDataset | TrackDataset) -> str:
    minutes = sum(track.seconds for track in dataset.tracks) / 60
    duration = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    return f"{plural(len(dataset.tracks), 'track')} ({duration})"


def _devices(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU ({torch.get_num_threads()} threads)"
    else:
        name = device.type
    return f"{trainer.world_size} x {name}"


def describe_point(path: Path, point: dict, conf: dict, trainer: pl.Trainer) -> str:
    """From where a run goes on, for the first screen."""
    batch = count_batches(conf, point["so_far"]["items"], trainer.world_size)
    return f"{'goes on':<11}in epoch {point['epoch']}, batch {batch}, from {path}"


def describe_finished(path: Path, point: dict, changes: list[str]) -> str:
    """Why there is nothing to do after the last checkpoint of a run, and what has changed since."""
    end, most = point["finished"], point["training_config"]["training"]["max_steps"]
    why = "more --epochs extend it"
    if end["early"]:
        why = "it stopped early"
    elif 0 < most <= point["global_step"]:
        why = f"it had --max_steps {most}"
    line = f"{path.parent.parent} is finished, after {plural(end['epochs'], 'epoch')}; {why}"
    return "\n  ".join([f"{line}; since then:" if changes else line, *changes])


def describe_stop(trainer: pl.Trainer) -> str:
    """Why training ended."""
    stopper = trainer.early_stopping_callback
    if stopper is not None and stopper.stopped_epoch:
        return f"stopped in epoch {stopper.stopped_epoch}: {stopper.stopping_reason_message}"
    epochs, steps = plural(trainer.current_epoch, "epoch"), plural(trainer.global_step, "step")
    return f"trained for {epochs}, {steps}"


def describe_end(trainer: pl.Trainer) -> str:
    """Where a run came to that did not come to its end, and how to go on."""
    best = trainer.checkpoint_callback
    points = list_last(Path(best.dirpath))
    way_on = f"goes on from {points[0]}" if points else "starts anew"
    return f"in epoch {trainer.current_epoch}; {describe_best(trainer)}\nthe same command {way_on}"


def describe_best(trainer: pl.Trainer) -> str:
    """Where the best model is."""
    best = trainer.checkpoint_callback
    if best.exported_score is None:
        return "there is no best_model.pth yet: no epoch came to its end"
    return f"best val_loss {best.exported_score:.6f}, in {best.exp_dir / 'best_model.pth'}"


def describe_epoch(epoch: int, metrics: dict, seconds: float) -> str:
    """The line of an epoch that is over."""
    line = (
        f"epoch {epoch}: train_loss {metrics['train_loss']:.6f},"
        f" val_loss {metrics['val_loss']:.6f}, lr {metrics['lr']:g},"
        f" {metrics['items_per_second']:.2f} items/s,"
        f" peak memory {metrics['peak_memory_gib']:.2f} GiB, {describe_time(seconds)}"
    )
    if skipped := int(metrics["skipped_steps"]):
        line += f"; {plural(skipped, 'step')} skipped, the gradients were not finite"
    return line


def describe_time(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever is readable."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def wait_and_look_at_clock(device: torch.device) -> float:
    """The time, in seconds, at which the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gather_peak_memory(trainer: pl.Trainer) -> float:
    """Bytes, the most of any rank: of the GPU where there is one, else of the process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    peak = torch.tensor(float(peak), device=device)
    return trainer.strategy.reduce(peak, reduce_op="max").item()


def forget_peak_memory() -> None:
    """Lets Linux count the peak of this process anew: comparing the fast formulas takes more than
    some runs do.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Forecast(pl.Callback):
    """Says after the first steps what memory and time the run will take.

    The first steps, which may compile, are left out, and the next few measured. The device is
    waited for before and after those, and never again.
    """

    UNMEASURED = 2  # optimizer steps
    MEASURED = 4

    def on_train_start(self, trainer, pl_module):
        forget_peak_memory()
        batches = trainer.num_training_batches
        self._first = min(self.UNMEASURED * trainer.accumulate_grad_batches, batches // 2)
        self._last = min(self._first + self.MEASURED * trainer.accumulate_grad_batches, batches)
        self._batches = 0

    def on_train_epoch_start(self, trainer, pl_module):
        if self._batches < self._last:  # no validation comes between the batches
            self._batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._batches += 1
        if self._batches == self._first:
            self._start = wait_and_look_at_clock(pl_module.device)
        elif self._first and self._batches == self._last:
            seconds = wait_and_look_at_clock(pl_module.device) - self._start
            per_batch = seconds / (self._last - self._first)
            peak = gather_peak_memory(trainer)
            pl_module.print(self._describe_memory(peak, pl_module))
            pl_module.print(self._describe_time(per_batch, trainer, pl_module.config["training"]))

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
        validation = validation_memory(system, track.length)
        return (
            f"{measured}; about {validation / 2**30:.2f} GiB for the longest"
            f" validation track ({describe_time(track.seconds)}), not measured"
        )

    def _describe_time(self, per_batch: float, trainer: pl.Trainer, training: dict) -> str:
        epoch, epochs = trainer.num_training_batches, training["epochs"]
        run, end = epoch * epochs, plural(epochs, "epoch")
        limit = training["max_steps"] * training["aggregate"]
        if 0 < limit < run:
            run, end = limit, plural(training["max_steps"], "step")
        return (
            f"{'time':<11}{describe_time(per_batch * epoch)} per epoch,"
            f" {describe_time(per_batch * run)} for {end}, measured on"
            f" {plural(self._last - self._first, 'batch', 'batches')}; validation comes on top"
        )


def validation_memory(system: pl.LightningModule, samples: int) -> int:
    """Bytes that separate(model, track, "full") keeps while it works on a track of `samples`, by
    the fast formulas.
    """
    if not find_stream_fault(system.model):
        return 0
    sizes, training = system.config["convtasnet"], system.config["training"]
    width = 4 if training["precision"] == "32-true" else 2  # bytes of what products give
    per_frame = 4 * sizes["B"] + width * max(sizes["B"], sizes["H"])
    return samples // (sizes["L"] // 2) * per_frame


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn twice a second; the loss on it is read at the log interval.

    Where steps are slow it is read every ten seconds, which costs next to nothing then.
    """

    DRAW, READ = 0.5, 10.0  # seconds

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._loss, self._drawn, self._read = {}, -math.inf, -math.inf
        self.on_train_epoch_start(trainer, pl_module)  # Lightning leaves it out within an epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        interval = trainer.log_every_n_steps * trainer.accumulate_grad_batches
        late = time.monotonic() - self._read > self.READ
        if self.is_enabled and (late or (batch_idx + 1) % interval == 0):
            self._loss = {"loss": trainer.logged_metrics["loss"].item()}
            self._read = time.monotonic()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer, pl_module, exception):
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.close()  # or else it would be drawn once more, after what is said of the end
        super().on_exception(trainer, pl_module, exception)

    def get_metrics(self, trainer, pl_module):
        return {**self._loss, **super().get_metrics(trainer, pl_module)}

    def _should_update(self, current, total):
        if not self.is_enabled or (current != total and time.monotonic() - self._drawn < self.DRAW):
            return False
        self._drawn = time.monotonic()
        return True
