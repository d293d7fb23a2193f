"""Going on where a run ended: its last checkpoints, the settings it had, logs that go on with it.

A run that goes on computes what an undisturbed one would, to the last bit. With Lightning alone it
would not: that starts the items of an epoch anew in its middle, and forgets what it had summed up.
So a checkpoint is taken before a batch, when nothing of the one before is pending, and the system
and the sampler keep what Lightning does not.
"""

import csv
import math
import re
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from local.checkpoint import atomic_path, load_weights_only, save_atomically
from local.config import CONF_FILE, EVERY, UserError, brief, model_args, model_name, read_conf
from local.interrupts import Interrupted, Interrupts
from local.recipe import describe_code, describe_objects, find_code_changes

KEPT = 2
NAME = re.compile(r"last-epoch=(0|[1-9]\d*)-step=(0|[1-9]\d*)\.ckpt")
# What a run may have another value of and still compute the same, as far as it goes. Of the files
# below root and of the devices, it matters what they are, not how they are called.
FREE = {"root", "valid_tracks", "num_workers", "checkpoint_every", "max_skipped_steps", "epochs"}
FREE |= {"exp_dir", "accelerator", "devices", "num_nodes"}


class LastCheckpoints(pl.Callback):
    """Checkpoints from which a run goes on, all taken before an optimizer step: at the start and
    before the last step of every epoch, in between, and when a signal ends the run; and at its end.

    Args:
        every: such as "30 min" or "500 steps".
    """

    PAUSE = 1.0  # seconds between two questions of the ranks to each other
    MOST_STEPS = 100  # between two such questions

    def __init__(self, folder: Path, every: str, interrupts: Interrupts):
        minutes, steps = re.fullmatch(EVERY, every).groups()
        self.seconds, self.steps = 60 * float(minutes or math.inf), int(steps or 0)
        self.folder, self.interrupts = folder, interrupts
        describe_code()  # before anybody edits it

    def on_train_start(self, trainer, pl_module):
        step = trainer.global_step
        self._saved_time = self._asked_time = time.monotonic()
        self._asked_step, self._next_question = step, step + 1
        self._saved_step = step if trainer.ckpt_path else -1
        if trainer.is_global_zero:
            later = [path for path in list_last(self.folder) if _step_of(path) > step]
            for path in (*later, *self.folder.glob(".*.tmp")):  # and what a killed run left
                path.unlink()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        in_a_step, step = trainer.accumulate_grad_batches, trainer.global_step
        if batch_idx % in_a_step:
            return
        signum, is_late = self._ask_ranks(trainer)
        is_due = is_late or (self.steps and step % self.steps == 0)
        is_last = batch_idx + in_a_step >= trainer.num_training_batches
        is_last |= step + 1 == pl_module.config["training"]["max_steps"]
        if step > self._saved_step and (is_due or signum or is_last or batch_idx == 0):
            self._save(trainer, self._take(trainer, batch_idx))
        if signum:
            self.interrupts.signum = signum  # another rank may have heard it
            # Lightning and torchrun end all processes soon after one has ended.
            trainer.strategy.barrier("the first rank has saved")
            raise Interrupted

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning would leave ReduceLROnPlateau out at the end of an epoch that was gone on with.
        trainer.fit_loop.restarting = False

    def on_train_end(self, trainer, pl_module):
        stopper = trainer.early_stopping_callback
        checkpoint = self._dump(trainer)
        checkpoint["so_far"]["items"] = 0  # of the next epoch
        checkpoint["finished"] = {
            "epochs": trainer.current_epoch,
            "early": stopper is not None and bool(stopper.stopping_reason_message),
        }
        self._save(trainer, checkpoint)

    def _ask_ranks(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """The signal that any rank has heard, 0 for none, and whether the minutes are over.

        All ranks get the same answer at the same step; for that they wait for each other, about
        once a second.
        """
        now, step = time.monotonic(), trainer.global_step
        is_late = now - self._saved_time >= self.seconds
        if trainer.world_size == 1:
            return self.interrupts.signum, is_late
        if step < self._next_question:
            return 0, False
        seconds = max(now - self._asked_time, 1e-6)
        steps = int(self.PAUSE * (step - self._asked_step) / seconds)
        pause = min(max(steps, 1), self.MOST_STEPS)
        # The clock of the first rank alone counts: no two are the same.
        own = [self.interrupts.signum, *((is_late, pause) if trainer.is_global_zero else (0, 0))]
        told = torch.tensor(own, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        signum, is_late, pause = told.tolist()
        self._asked_time, self._asked_step, self._next_question = now, step, step + pause
        return signum, bool(is_late)

    def _take(self, trainer: pl.Trainer, batch_idx: int) -> dict:
        """A checkpoint at the start of a batch, as if that had not been fetched yet."""
        checkpoint = self._dump(trainer)
        loops = checkpoint["loops"]["fit_loop"]
        if batch_idx == 0:
            for progress in loops["epoch_progress"].values():  # nor has the epoch begun
                progress["ready"] = progress["started"] = progress["processed"]
        else:
            batches = loops["epoch_loop.batch_progress"]
            batches["is_last_batch"] = False
            for kind in ("total", "current"):
                batches[kind]["ready"] = batches[kind]["started"]
        return checkpoint

    def _dump(self, trainer: pl.Trainer) -> dict:
        for logger in trainer.loggers:
            logger.save()
        metrics = self.folder.with_name("logs") / "metrics.csv"
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        system = trainer.lightning_module
        checkpoint["so_far"] |= {
            "metrics": metrics.read_bytes().decode() if metrics.is_file() else "",
            "surroundings": describe_surroundings(
                trainer, system.train_loader.dataset, system.val_loader.dataset
            ),
            "code": describe_code(),
            "objects": describe_objects(system, trainer),
        }
        return checkpoint

    def _save(self, trainer: pl.Trainer, checkpoint: dict) -> None:
        if trainer.is_global_zero:
            epoch, step = checkpoint["epoch"], checkpoint["global_step"]
            self.folder.mkdir(exist_ok=True)
            save_atomically(checkpoint, self.folder / f"last-epoch={epoch}-step={step}.ckpt")
            for old in list_last(self.folder)[KEPT:]:
                old.unlink()
        self._saved_time, self._saved_step = time.monotonic(), checkpoint["global_step"]


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


def _step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[2])


def list_last(folder: Path) -> list[Path]:
    """The last checkpoints in a folder, the newest first."""
    found = {}
    for path in folder.glob("last-*.ckpt"):
        if (place := NAME.fullmatch(path.name)) and path.is_file():
            found[tuple(map(int, place.groups()))] = path
    return [found[place] for place in sorted(found, reverse=True)]


def load_last(folder: Path, set_aside: bool) -> tuple[Path | None, dict | None]:
    """The newest checkpoint that can be read, as from `load_point`; nothing where there is none.

    Args:
        set_aside: whether those that cannot be read are renamed; they are named in any case.
    """
    for path in list_last(folder):
        try:
            return path, load_point(path)
        except UserError as error:
            aside = path.with_suffix(".damaged")
            if rank_zero_only.rank == 0:
                renamed = f"; renamed to {aside.name}" if set_aside else ""
                print(f"warning: {error}{renamed}", file=sys.stderr)
            if set_aside:
                path.rename(aside)
    return None, None


def load_point(path: Path) -> dict:
    """What a checkpoint of `LastCheckpoints` says of its run: all but the model and its optimizer.

    Raises:
        UserError: it is damaged, or another kind.
    """
    try:
        checkpoint = load_weights_only(path)
        if not isinstance(checkpoint, dict) or "metrics" not in checkpoint.get("so_far", ()):
            raise ValueError("it is no last-*.ckpt")
    except Exception as error:
        raise UserError(f"{path}: no checkpoint to go on from: {brief(error)}") from None
    kept = ("epoch", "global_step", "training_config", "so_far", "finished")
    return {name: checkpoint[name] for name in kept if name in checkpoint}


def describe_surroundings(trainer: pl.Trainer, train_set, valid_set) -> dict[str, list[str]]:
    """What a run depends on beside its settings."""
    tracks = {"training tracks": train_set.tracks, "validation tracks": valid_set.tracks}
    return {
        "devices": [f"{trainer.world_size} x {trainer.strategy.root_device.type}"],
        **{
            name: [f"{track.name} ({track.length} samples)" for track in found]
            for name, found in tracks.items()
        },
    }


def find_changes(conf: dict, surroundings: dict[str, list[str]], point: dict) -> list[str]:
    """By what a run would not be the one that a checkpoint is from, a line each."""
    saved = point["training_config"]
    # What a run of an earlier version had no key for, it did as the default has it.
    before = {
        section: {**keys, **saved.get(section, {})}
        for section, keys in {**dict.fromkeys(conf, {}), **read_conf(CONF_FILE)}.items()
    }
    changes = [
        f"--{key}: {before[section].get(key)} before, {value} now"
        for section, keys in conf.items()
        for key, value in keys.items()
        if key not in FREE and before[section].get(key) != value
    ]
    for name, now in surroundings.items():
        then = point["so_far"]["surroundings"][name]
        if then != now:
            gone = [item for item in then if item not in now]
            new = [item for item in now if item not in then]
            changes.append(f"{name}: {_first(*gone)} before, {_first(*new)} now")
    return changes


def _first(*names: str, most: int = 3) -> str:
    shown = ", ".join(names[:most]) or "no other"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def check_point(
    conf: dict, point: dict, trainer: pl.Trainer, train_set, valid_set, accept_changes: bool
) -> list[str]:
    """What has changed since a checkpoint, a line each, where the run can go on from it.

    Raises:
        UserError: it cannot. Something has changed that was not accepted, or the model has, or
            there is no such place in the run any more.
    """
    exp_dir, epochs = conf["main_args"]["exp_dir"], conf["training"]["epochs"]
    changes = find_changes(conf, describe_surroundings(trainer, train_set, valid_set), point)
    code_changes = find_code_changes(point["so_far"].get("code", {}))
    if is_finished(point, conf) and not changes:
        return code_changes
    odd = "settings" if changes else "code"
    changes += code_changes
    is_same_model = describe_network(point["training_config"]) == describe_network(conf)
    if changes and not (accept_changes and is_same_model):
        advice = "name another --exp_dir"
        if is_same_model:
            advice += ", or go on with --resume_with_changes"
        heading = f"{exp_dir}: the run had other {odd}; {advice}:"
        raise UserError("\n  ".join([heading, *changes]))
    if is_finished(point, conf):
        return changes
    if "objects" not in point["so_far"]:
        raise UserError(
            f"{exp_dir}: its last-*.ckpt are of an earlier version of this recipe, and a run cannot"
            " go on from them; name another --exp_dir"
        )
    place = f"{exp_dir}: the run goes on in epoch {point['epoch']}"
    if point["epoch"] >= epochs:
        raise UserError(f"{place}, and --epochs {epochs} has none such")
    seen = point["so_far"]["items"]
    if seen >= len(train_set):
        raise UserError(
            f"{place} after {seen} items, and with these settings it has {len(train_set)};"
            " name another --exp_dir"
        )
    return changes


def describe_network(conf: dict) -> tuple[str, dict]:
    return model_name(conf), model_args(conf)


def is_finished(point: dict, conf: dict) -> bool:
    """Whether a run has nothing left to do."""
    end, training = point.get("finished"), conf["training"]
    return bool(end) and (
        (end["early"] and training["early_stop"])
        or training["epochs"] <= end["epochs"]
        or 0 < training["max_steps"] <= point["global_step"]
    )


def record_changes(exp_dir: Path, changes: list[str], point: dict) -> None:
    """Adds to EXP/changes.yml what was changed, and from which epoch and step on."""
    path = exp_dir / "changes.yml"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    place = {"epoch": point["epoch"], "step": point["global_step"]}
    added = yaml.safe_dump([{**place, "changes": changes}], allow_unicode=True, sort_keys=False)
    if not before.endswith(added):  # by a run that was killed before it had a checkpoint of its own
        with atomic_path(path) as temporary:
            temporary.write_text(before + added, encoding="utf-8")
