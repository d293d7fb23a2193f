"""What each use of something private relies on. A failure names the function that would break."""

import os
import signal
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar, WeightAveraging
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.modules import module as torch_module

from local.tools.private import (
    GLOBAL_HOOKS,
    HOOKS,
    draw_bar_if,
    end_with_sigterm_as_with_ctrl_c,
    has_hooks,
    kill_launched_processes,
    move_average,
    rewind_loops,
    set_finished_batches,
)

REGISTER = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)
REGISTER_FOR_ALL = tuple(name.replace("register", "register_module") for name in REGISTER)


@pytest.mark.parametrize("name", [*REGISTER, *REGISTER_FOR_ALL])
def test_has_hooks_sees_every_kind_of_hook(name):
    module = nn.Linear(1, 1)
    for owner, attributes in (module, HOOKS), (torch_module, GLOBAL_HOOKS):
        for attribute in attributes:
            assert hasattr(owner, attribute), (
                f"torch has no {attribute} any more: has_hooks in local/tools/private.py is blind"
            )
    owner = torch_module if name in REGISTER_FOR_ALL else module
    blind = f"torch keeps hooks of {name} elsewhere: has_hooks in local/tools/private.py is blind"
    assert not has_hooks(module), blind
    handle = getattr(owner, name)(lambda *_: None)
    try:
        assert has_hooks(module), blind
    finally:
        handle.remove()
    assert not has_hooks(module), blind


class Small(pl.LightningModule):
    """A model of one weight, on five batches of an item."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, int(batch)))
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(5.0)[:, None], shuffle=False)


def make_trainer(*callbacks, **settings) -> pl.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_model_summary")
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        **{**dict.fromkeys(quiet, False), "enable_progress_bar": False, **settings},
    )


def test_a_sigterm_in_fit_is_a_keyboard_interrupt():
    class Terminate(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(Terminate(), max_epochs=1)
    for owner, name in (
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
        (trainer._signal_connector, "_sigterm_notifier_fn"),
    ):
        assert callable(getattr(owner, name, None)), (
            f"Lightning has no {name} any more: see end_with_sigterm_as_with_ctrl_c"
        )
    end_with_sigterm_as_with_ctrl_c(trainer)
    system = Small()
    with pytest.raises(SystemExit):  # Lightning's end after Ctrl-C
        trainer.fit(system)
    assert system.seen == [], "Lightning handles SIGTERM otherwise: end_with_sigterm_as_with_ctrl_c"


def test_ranks_would_exchange_a_tensor_before_every_batch(monkeypatch):
    class TwoRanks(pl.Callback):
        """As if there were two, from when the loader is there."""

        def on_train_epoch_start(self, trainer, pl_module):
            monkeypatch.setattr(pl.Trainer, "world_size", 2)
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

        def on_train_batch_end(self, trainer, *args):
            if trainer.is_last_batch:
                monkeypatch.undo()

    calls = []
    trainer = make_trainer(TwoRanks(), max_epochs=1)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: calls.append(1)
    trainer.fit(Small())
    assert len(calls) == 5, (
        "Lightning calls _broadcast_sigterm_tensor otherwise: end_with_sigterm_as_with_ctrl_c may"
        " have nothing left to do"
    )


def test_launched_processes_are_those_of_the_launcher():
    trainer = make_trainer(devices=2, strategy=DDPStrategy())
    assert trainer.strategy.launcher.procs == [], (
        "the launcher keeps its processes elsewhere: see kill_launched_processes"
    )
    killed = []
    trainer.strategy.launcher.procs.append(SimpleNamespace(kill=lambda: killed.append(1)))
    kill_launched_processes(trainer)
    assert (killed, trainer.strategy.launcher.procs) == ([1], [])
    kill_launched_processes(make_trainer())  # without a launcher


def test_lightning_asks_whether_to_draw_its_bar():
    bar, asked = TQDMProgressBar(), []
    draw_bar_if(bar, lambda current, total: asked.append((current, total)))
    make_trainer(bar, max_epochs=1, enable_progress_bar=True).fit(Small())
    assert asked == [(batch, 5) for batch in range(1, 6)], (
        "TQDMProgressBar no longer asks _should_update: see draw_bar_if"
    )


class SaveBefore(pl.Callback):
    """Saves a checkpoint before a batch, and changes it."""

    def __init__(self, path, epoch: int, batch: int, change):
        self.path, self.place, self.change = path, (epoch, batch), change

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.change(checkpoint)


def resume(path, epoch: int, batch: int, change) -> list[tuple[int, int]]:
    """The (epoch, batch) that a run sees which resumes from a checkpoint so saved."""
    make_trainer(SaveBefore(path, epoch, batch, change), max_epochs=2).fit(Small())
    system = Small()
    make_trainer(max_epochs=2).fit(system, ckpt_path=path, weights_only=True)
    return [place[:2] for place in system.seen]


@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 3), (1, 0), (1, 4)])
def test_a_rewound_checkpoint_resumes_with_its_batch(epoch, batch, tmp_path):
    seen = resume(tmp_path / "a.ckpt", epoch, batch, lambda c: rewind_loops(c, batch))
    everything = [(epoch, batch) for epoch in range(2) for batch in range(5)]
    assert seen == everything[everything.index((epoch, batch)) :], (
        "Lightning keeps the progress of its loops otherwise: see rewind_loops"
    )


def test_a_checkpoint_is_resumed_after_the_batches_that_it_says_are_finished(tmp_path):
    def change(checkpoint):
        rewind_loops(checkpoint, 3)
        set_finished_batches(checkpoint, 1)

    assert resume(tmp_path / "a.ckpt", 1, 3, change) == [(1, batch) for batch in range(1, 5)], (
        "Lightning keeps the progress of its loops otherwise: see set_finished_batches"
    )


def test_move_average_moves_the_averaged_model():
    averaging, device = WeightAveraging(), torch.device("meta")
    averaging.setup(SimpleNamespace(), Small(), "fit")
    move_average(averaging, device)
    checkpoint = {"state_dict": {}}
    averaging.on_save_checkpoint(SimpleNamespace(), Small(), checkpoint)
    devices = {tensor.device for tensor in checkpoint["state_dict"].values()}
    assert devices == {device}, "Lightning keeps the average elsewhere: see local/tools/private.py"
