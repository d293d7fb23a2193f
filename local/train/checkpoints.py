"""The checkpoints of a run: the best, and the last two, from which it resumes.

A resumed run computes what an undisturbed one would, to the last bit. With Lightning alone it would
not: that restarts the items of an epoch in its middle, and forgets what was summed within it. So
the last checkpoints are taken before a batch, when nothing of the one before is pending, and the
callbacks and the sampler keep what Lightning does not.
"""

import json
import re
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from local.checkpoint import save_best_model
from local.keys import read_interval
from local.tools.files import atomic_path
from local.tools.private import rewind_loops, set_finished_batches
from local.tools.random_states import get_random_states, set_random_states
from local.tools.weights import load_checkpoint, save_atomically
from local.train.interrupts import Interrupted, Interrupts
from local.train.loaders import count_batches
from local.train.origin import describe_origin, find_commit
from local.train.ranks import gather_from_ranks
from local.train.recipe import describe_code, describe_inputs, describe_objects, keep_edits

KEPT = 2
NAME = re.compile(r"last-epoch=(0|[1-9]\d*)-step=(0|[1-9]\d*)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writing of checkpoints, made atomic."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_atomically(checkpoint, Path(path))


class BestCheckpoints(ModelCheckpoint):
    """The best checkpoints by val_loss; best_model.pth and best_k_models.json follow them.

    Args:
        keep: how many.
    """

    NAME = re.compile(r"epoch=(\d+)-step=(\d+)(-v\d+)?\.ckpt")

    def __init__(self, exp_dir: Path, keep: int):
        super().__init__(
            exp_dir / "checkpoints",
            monitor="val_loss",
            mode="min",
            save_top_k=keep,
            save_on_train_epoch_end=True,
        )
        self.exp_dir = exp_dir
        self.exported_score = None  # val_loss of best_model.pth
        self._surplus = []  # checkpoints of a run that has kept more

    def load_state_dict(self, state_dict):
        """Restores what was kept, wherever the run was moved to."""
        folder, scores = Path(self.dirpath), state_dict["best_k_models"]
        paths = {folder / Path(path).name: score for path, score in scores.items()}
        found = {str(path): score for path, score in paths.items() if path.is_file()}
        self._surplus = sorted(found, key=found.get)[self.save_top_k :]
        kept = {path: score for path, score in found.items() if path not in self._surplus}
        best, worst = (choose(kept, key=kept.get, default="") for choose in (min, max))
        is_full = len(kept) == self.save_top_k
        restored = {
            "dirpath": self.dirpath,
            "best_k_models": kept,
            "best_model_path": best,
            "best_model_score": kept.get(best),
            "kth_best_model_path": worst if is_full else "",
            "kth_value": kept[worst] if is_full else state_dict["kth_value"],
        }
        super().load_state_dict({**state_dict, **restored})
        if (self.exp_dir / "best_model.pth").is_file():
            self.exported_score = state_dict["best_model_score"]

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            for path in Path(self.dirpath).glob("epoch=*.ckpt"):
                name = self.NAME.fullmatch(path.name)
                if name and int(name[2]) > trainer.global_step:
                    path.unlink()
            for path in self._surplus:
                Path(path).unlink(missing_ok=True)
        if trainer.is_global_zero and self.best_model_path and self.exported_score is None:
            self._export(pl_module)

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
        if self.exported_score is None or self.best_model_score < self.exported_score:
            self._export(pl_module)

    def _export(self, system):
        """Takes the weights from the checkpoint: with --ema those are the average, of which
        val_loss is, and the System has those that it trains.
        """
        path, prefix = Path(self.best_model_path), "model."  # its name in the System
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in load_checkpoint(path)["state_dict"].items()
            if name.startswith(prefix)
        }
        epoch = int(self.NAME.fullmatch(path.name)[1])
        origin = describe_origin(system, epoch, self.best_model_score.item())
        save_best_model(self.exp_dir / "best_model.pth", state, system.config, origin)
        self.exported_score = self.best_model_score


class RandomStates(pl.Callback):
    """Keeps the states of all random generators in checkpoints, for every rank."""

    _resumed = ()

    def setup(self, trainer, pl_module, stage):
        self._device = trainer.strategy.root_device

    def state_dict(self) -> dict:
        return {"ranks": gather_from_ranks(get_random_states(self._device))}

    def load_state_dict(self, state_dict):
        self._resumed = state_dict["ranks"]

    def on_train_start(self, trainer, pl_module):
        for states in self._resumed[trainer.global_rank : trainer.global_rank + 1]:
            set_random_states(states, self._device)


class LastCheckpoints(pl.Callback):
    """Checkpoints from which a run resumes, all taken before an optimizer step: at the start and
    before the last step of every epoch, at intervals, and when a signal ends the run; and one when
    training ends. Their entry "run" says what `resume` needs to know.

    Args:
        every: the interval, such as "30 min" or "500 steps".
    """

    PAUSE = 1.0  # seconds between two exchanges of the ranks
    MOST_STEPS = 100  # between two exchanges

    _batch_idx = None  # before which a last checkpoint is being saved; -1 at the end of training

    def __init__(self, folder: Path, every: str, interrupts: Interrupts):
        self.seconds, self.steps = read_interval(every)
        self.folder, self.interrupts = folder, interrupts
        describe_code(), find_commit()  # before anybody edits it

    def on_train_start(self, trainer, pl_module):
        step = trainer.global_step
        self._saved_time = self._exchange_time = time.monotonic()
        self._exchange_step, self._next_exchange = step, step + 1
        self._saved_step = step if trainer.ckpt_path else -1
        if trainer.is_global_zero:
            later = [path for path in list_last(self.folder) if _read_step(path) > step]
            for path in (*later, *self.folder.glob(".*.tmp")):  # which a killed run has left
                path.unlink()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        in_a_step, step = trainer.accumulate_grad_batches, trainer.global_step
        if batch_idx % in_a_step:
            return
        signum, is_late = self._exchange(trainer)
        is_due = is_late or (self.steps and step % self.steps == 0)
        is_last = batch_idx + in_a_step >= trainer.num_training_batches
        is_last |= step + 1 == pl_module.config["training"]["max_steps"]
        if step > self._saved_step and (is_due or signum or is_last or batch_idx == 0):
            self._save(trainer, batch_idx)
        if signum:
            self.interrupts.signum = signum  # it may have come to another rank
            # Lightning and torchrun end all processes soon after one has ended.
            trainer.strategy.barrier("the first rank has saved")
            raise Interrupted

    def on_train_batch_end(self, trainer, *args):
        # Else Lightning would skip ReduceLROnPlateau at the end of an epoch that was resumed.
        trainer.fit_loop.restarting = False

    def on_train_end(self, trainer, pl_module):
        self._save(trainer, -1)

    def _save(self, trainer: pl.Trainer, batch_idx: int) -> None:
        for logger in trainer.loggers:
            logger.save()
        name = f"last-epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        self._batch_idx = batch_idx
        trainer.save_checkpoint(self.folder / name, weights_only=False)
        self._batch_idx = None
        if trainer.is_global_zero:
            remove_old(self.folder)
        self._saved_time, self._saved_step = time.monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self._batch_idx is None:
            return  # one of the best
        metrics = self.folder.with_name("logs") / "metrics.csv"
        train_loader, valid_loader = pl_module.train_loader, pl_module.val_loader
        items = self._batch_idx * train_loader.batch_size * trainer.world_size
        checkpoint["run"] = {
            "items": max(items, 0),  # of the epoch that are done
            "metrics": metrics.read_bytes().decode() if metrics.is_file() else "",
            "inputs": describe_inputs(trainer, train_loader.dataset, valid_loader.dataset),
            "code": describe_code(),
            "objects": describe_objects(pl_module, trainer),
        }
        if self._batch_idx >= 0:
            rewind_loops(checkpoint, self._batch_idx)
            return
        stopper = trainer.early_stopping_callback
        checkpoint["run"]["finished"] = {
            "epochs": trainer.current_epoch,
            "early": stopper is not None and bool(stopper.stopping_reason_message),
        }

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        """Resumes within the epoch, with the objects that train.py makes now: what they are made
        with now takes precedence over what they were made with.
        """
        if "run" not in checkpoint:
            return  # one of the best
        if "current_model_state" in checkpoint:  # of a run with --ema: this one may be without
            pl_module.load_state_dict(checkpoint["current_model_state"])
        batches = count_batches(pl_module.config, checkpoint["run"]["items"], trainer.world_size)
        start = batches * pl_module.train_loader.batch_size
        pl_module.train_loader.sampler.resume(checkpoint["epoch"], start)
        if batches:  # they may be of another size now
            set_finished_batches(checkpoint, batches)
        keep_edits(checkpoint, describe_objects(pl_module, trainer))

    def _exchange(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """The signal that any rank has got, 0 for none, and whether the interval is over.

        All ranks get the same answer at the same step; for that they wait for each other, about
        once a second.
        """
        now, step = time.monotonic(), trainer.global_step
        is_late = now - self._saved_time >= self.seconds
        if trainer.world_size == 1:
            return self.interrupts.signum, is_late
        if step < self._next_exchange:
            return 0, False
        seconds = max(now - self._exchange_time, 1e-6)
        steps = int(self.PAUSE * (step - self._exchange_step) / seconds)
        pause = min(max(steps, 1), self.MOST_STEPS)
        # No two clocks are the same: that of the first rank decides.
        own = [self.interrupts.signum, *((is_late, pause) if trainer.is_global_zero else (0, 0))]
        largest = torch.tensor(own, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        signum, is_late, pause = largest.tolist()
        self._exchange_time, self._exchange_step, self._next_exchange = now, step, step + pause
        return signum, bool(is_late)


def remove_old(folder: Path) -> None:
    """Removes all last checkpoints but the newest two."""
    for path in list_last(folder)[KEPT:]:
        path.unlink()


def _read_step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[2])


def list_last(folder: Path) -> list[Path]:
    """The last checkpoints in a folder, the newest first."""
    found = {}
    for path in folder.glob("last-*.ckpt"):
        if (place := NAME.fullmatch(path.name)) and path.is_file():
            found[tuple(map(int, place.groups()))] = path
    return [found[place] for place in sorted(found, reverse=True)]
