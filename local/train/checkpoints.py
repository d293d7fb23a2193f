"""The checkpoints of a run: the ten best, and the last two, from which it resumes."""

import json
import re
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from local.checkpoint import load_model, save_best_model
from local.config import read_interval
from local.tools.files import atomic_path
from local.tools.weights import save_atomically
from local.train.interrupts import Interrupted, Interrupts
from local.train.recipe import describe_code, describe_objects, describe_surroundings


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Lightning writes checkpoints, made atomic."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_atomically(checkpoint, Path(path))


class BestCheckpoints(ModelCheckpoint):
    """The ten best checkpoints by val_loss; best_model.pth and best_k_models.json follow them."""

    NAME = re.compile(r"epoch=\d+-step=(\d+)(-v\d+)?\.ckpt")

    def __init__(self, exp_dir: Path):
        super().__init__(
            exp_dir / "checkpoints",
            monitor="val_loss",
            mode="min",
            save_top_k=10,
            save_on_train_epoch_end=True,
        )
        self.exp_dir = exp_dir
        self.exported_score = None  # val_loss of best_model.pth

    def load_state_dict(self, state_dict):
        """Restores what was kept, wherever the run was moved to."""
        folder, scores = Path(self.dirpath), state_dict["best_k_models"]
        paths = {folder / Path(path).name: score for path, score in scores.items()}
        kept = {str(path): score for path, score in paths.items() if path.is_file()}
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
                if name and int(name[1]) > trainer.global_step:
                    path.unlink()
        if trainer.is_global_zero and self.best_model_path and self.exported_score is None:
            self._export(load_model(self.best_model_path), pl_module.config)

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
            self._export(pl_module.model, pl_module.config)

    def _export(self, model, conf):
        save_best_model(self.exp_dir / "best_model.pth", model, conf)
        self.exported_score = self.best_model_score


KEPT = 2
NAME = re.compile(r"last-epoch=(0|[1-9]\d*)-step=(0|[1-9]\d*)\.ckpt")


class LastCheckpoints(pl.Callback):
    """Checkpoints from which a run goes on, all taken before an optimizer step: at the start and
    before the last step of every epoch, in between, and when a signal ends the run; and at its end.

    Args:
        every: such as "30 min" or "500 steps".
    """

    PAUSE = 1.0  # seconds between two questions of the ranks to each other
    MOST_STEPS = 100  # between two such questions

    def __init__(self, folder: Path, every: str, interrupts: Interrupts):
        self.seconds, self.steps = read_interval(every)
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


def _step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[2])


def list_last(folder: Path) -> list[Path]:
    """The last checkpoints in a folder, the newest first."""
    found = {}
    for path in folder.glob("last-*.ckpt"):
        if (place := NAME.fullmatch(path.name)) and path.is_file():
            found[tuple(map(int, place.groups()))] = path
    return [found[place] for place in sorted(found, reverse=True)]
