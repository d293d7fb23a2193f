"""A run that is resumed after train.py was edited: as edited, or refused."""

import re

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY_RUN
from pytorch_lightning.callbacks import EarlyStopping
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import local.train.checkpoints
import local.train.recipe
import train
from local.config import OPTIONS, parse_conf, read_conf
from local.keys import KEYS
from local.system import MusicSystem
from local.tools.weights import load_weights_only
from local.train.checkpoints import list_last
from local.train.recipe import (
    VERSIONS,
    describe_code,
    describe_object,
    describe_optimizer,
    find_code_changes,
)
from local.train.resume import find_changes, load_last_checkpoint

WEIGHTS = [torch.nn.Parameter(torch.ones(2))]


def test_objects_are_described_by_what_is_not_their_default():
    adam = torch.optim.Adam(WEIGHTS, lr=0.1, fused=True)
    assert describe_optimizer(adam) == "Adam(lr=0.1, fused=True)"
    adam.param_groups[0]["lr"] = 0.05  # halved
    assert describe_optimizer(adam).startswith("Adam(lr=0.05")
    sgd = torch.optim.SGD(WEIGHTS, lr=0.001, momentum=0.9)
    adamw = torch.optim.AdamW(WEIGHTS, weight_decay=0.01)
    assert describe_optimizer(adamw) == "AdamW(lr=0.001, weight_decay=0.01)"
    assert describe_optimizer(sgd) == "SGD(lr=0.001, momentum=0.9)"
    plateau = ReduceLROnPlateau(adam, factor=0.5, patience=5)
    assert describe_object(plateau) == "ReduceLROnPlateau(factor=0.5, patience=5)"
    assert describe_object(StepLR(adam, 7)) == "StepLR(step_size=7)"
    stop = EarlyStopping("val_loss", patience=20)
    assert describe_object(stop) == "EarlyStopping(monitor=val_loss, patience=20)"
    assert describe_object(torch.nn.L1Loss()) == "L1Loss()"
    assert describe_object(torch.nn.functional.l1_loss) == "l1_loss"


def test_code_and_versions_are_compared():
    code = describe_code()
    assert {"train.py", "local/tasnet.py", "local/fast/rows.py", *VERSIONS} <= set(code)
    assert find_code_changes(code) == []
    edited = {**code, "local/tasnet.py": "0", "local/gone.py": "1", "torch": "1.0"}
    files, version = find_code_changes(edited)
    assert files == "code: changed since in local/tasnet.py, local/gone.py"
    assert version == f"torch: 1.0 before, {code['torch']} now"


def flags(exp_dir, corpus, *more) -> list[str]:
    sizes = ["--samples_per_track", 8, "--batch_size", 4, "--accelerator", "cpu"]
    return [*map(str, ["--exp_dir", exp_dir, "--root", corpus, *TINY_RUN, *sizes, *more])]


@pytest.fixture
def half(corpus, tmp_path) -> list[str]:
    """The flags of a run of two epochs, which has been run."""
    arguments = flags(tmp_path / "run", corpus)
    train.main([*arguments, "--epochs", "2"])
    return arguments


@pytest.fixture
def edited(monkeypatch):
    """As if local/system.py, say, had been edited since."""
    code = {**describe_code(), "local/system.py": "another"}
    for module in (local.train.recipe, local.train.checkpoints):
        monkeypatch.setattr(module, "describe_code", lambda: code)


def edit_system(monkeypatch, change) -> list[MusicSystem]:
    """Lets `change` change every System that train.py makes; returns those."""
    made, make = [], train.make_system

    def make_edited(*args):
        made.append(make(*args))
        change(made[-1])
        return made[-1]

    monkeypatch.setattr(train, "make_system", make_edited)
    return made


def test_other_code_is_refused_or_recorded(half, edited, tmp_path, error_of, monkeypatch):
    error = error_of(train.main, *half, "--epochs", "3")
    assert re.search("--resume_with_changes:?\n  code: changed since in local/system.py", error)
    train.main([*half, "--epochs", "3", "--resume_with_changes"])
    assert "local/system.py" in (tmp_path / "run" / "changes.yml").read_text()


def test_a_finished_run_says_what_has_changed_since(half, edited, capsys):
    train.main([*half, "--epochs", "2"])
    finished, changed = capsys.readouterr().out.splitlines()
    assert "is finished" in finished
    assert "local/system.py" in changed


def test_what_the_objects_were_made_with_is_that_of_the_code(half, edited, monkeypatch, tmp_path):
    def change(system):
        system.optimizer = torch.optim.Adam(
            system.model.parameters(), lr=0.0005, betas=(0.5, 0.9), weight_decay=0.1, fused=True
        )
        system.scheduler = ReduceLROnPlateau(system.optimizer, factor=0.3, patience=2)

    (before,) = load_weights_only(list_last(tmp_path / "run" / "checkpoints")[0])["lr_schedulers"]
    made = edit_system(monkeypatch, change)
    monkeypatch.setattr("pytorch_lightning.callbacks.EarlyStopping", lambda *args, **kwargs: stop)
    stop = EarlyStopping("val_loss", mode="min", patience=7)
    train.main([*half, "--epochs", "3", "--resume_with_changes"])
    (group,) = made[-1].optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["fused"]) == ((0.5, 0.9), 0.1, True)
    assert made[-1].optimizer.state  # and it came as far as before
    scheduler = made[-1].scheduler[0]
    assert (scheduler.factor, scheduler.patience) == (0.3, 2)
    assert scheduler.last_epoch == before["last_epoch"] + 1
    assert stop.patience == 7


def test_another_optimizer_starts_again(half, edited, monkeypatch):
    def change(system):
        system.optimizer = torch.optim.SGD(system.model.parameters(), lr=0.01)
        system.scheduler = StepLR(system.optimizer, 1)

    made = edit_system(monkeypatch, change)
    train.main([*half, "--epochs", "3", "--resume_with_changes"])
    (group,) = made[-1].optimizer.param_groups
    assert "betas" not in group
    assert group["lr"] == pytest.approx(0.001)  # a step of the schedule


def test_what_was_best_by_another_loss_says_nothing(half, edited, monkeypatch, tmp_path):
    exp_dir = tmp_path / "run"
    before = load_weights_only(exp_dir / "best_model.pth")["state_dict"]
    kept = set(exp_dir.glob("checkpoints/epoch=*.ckpt"))

    class Larger(torch.nn.Module):
        def forward(self, estimates, targets):
            return 1000 + (estimates - targets).square().mean()

    edit_system(monkeypatch, lambda system: setattr(system, "loss_func", Larger()))
    train.main([*half, "--epochs", "3", "--resume_with_changes"])
    after = load_weights_only(exp_dir / "best_model.pth")["state_dict"]
    assert any(not torch.equal(after[name], before[name]) for name in before)
    train.main([*half, "--epochs", "4"])
    assert kept <= set(exp_dir.glob("checkpoints/epoch=*.ckpt"))  # nothing went in silence


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "Adam"])
def test_any_optimizer_skips_a_step_that_is_not_finite(kind, corpus, tmp_path, monkeypatch):
    def change(system):
        system.optimizer = getattr(torch.optim, kind)(system.model.parameters(), lr=1e-4)
        system.scheduler = None
        loss, calls = system.loss_func.forward, []

        def forward(estimates, targets):
            calls.append(system.training)
            return loss(estimates, targets) * (torch.nan if calls.count(True) == 2 else 1)

        system.loss_func.forward = forward

    class Weights(pl.Callback):
        seen = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.seen.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).clone())

    made = edit_system(monkeypatch, change)
    make_trainer, weights = train.make_trainer, Weights()

    def make(*args):
        trainer = make_trainer(*args)
        trainer.callbacks.append(weights)
        return trainer

    monkeypatch.setattr(train, "make_trainer", make)
    train.main(flags(tmp_path / "run", corpus))
    first, second, third, *_ = weights.seen
    assert torch.equal(first, second)  # the step was skipped
    assert not torch.equal(second, third)
    assert third.isfinite().all()
    assert made[-1].trainer.logged_metrics["skipped_steps"] == 1


def test_a_file_that_ones_own_code_misses_keeps_its_traceback(corpus, tmp_path, monkeypatch):
    def change(system):
        system.loss_func.forward = lambda *args: open(tmp_path / "weights.csv")

    edit_system(monkeypatch, change)
    with pytest.raises(FileNotFoundError, match=r"weights\.csv"):
        train.main(flags(tmp_path / "run", corpus))


def test_a_wrong_shape_is_a_line_before_the_first_step(corpus, tmp_path, monkeypatch, error_of):
    def change(system):
        forward = system.model.forward
        system.model.forward = lambda mixture: forward(mixture)[..., :-1]

    edit_system(monkeypatch, change)
    error = error_of(train.main, *flags(tmp_path / "run", corpus))
    assert "ConvTasNetStereo gives (4, 2, 2, 3999)" in error
    assert not (tmp_path / "run" / "best_model.pth").exists()


def test_fast_yes_refuses_an_edited_model(corpus, tmp_path, monkeypatch, error_of):
    def change(system):
        system.model.encoder.register_forward_hook(lambda *args: None)

    edit_system(monkeypatch, change)
    error = error_of(train.main, *flags(tmp_path / "run", corpus, "--fast", "yes"))
    assert "--fast yes: " in error and "encoder has hooks" in error
    assert not (tmp_path / "run").exists()


def test_a_key_that_a_run_did_not_know_counts_as_its_default(half, tmp_path):
    conf = parse_conf([*half, "--epochs", "2"])
    for option in OPTIONS:
        del conf["main_args"][option]
    (newest, *_) = list_last(tmp_path / "run" / "checkpoints")
    content, defaults = load_weights_only(newest), read_conf()
    saved = content["training_config"]
    for section, keys in KEYS.items():
        for name in keys:
            if saved[section][name] == defaults[section][name]:
                shorter = {key: value for key, value in saved[section].items() if key != name}
                earlier = {**content, "training_config": {**saved, section: shorter}}
                torch.save(earlier, tmp_path / "earlier.ckpt")
                loaded = load_last_checkpoint(tmp_path / "earlier.ckpt")
                assert find_changes(conf, content["run"]["inputs"], loaded) == []


def test_an_earlier_version_is_refused_in_a_line(half, tmp_path, error_of):
    (newest, *_) = list_last(tmp_path / "run" / "checkpoints")
    content = load_weights_only(newest)
    content["so_far"] = content.pop("run")
    torch.save(content, newest)
    error = error_of(train.main, *half, "--epochs", "3")
    assert re.search(f"{newest}: an earlier version .*; name another --exp_dir\n$", error)
    assert newest.is_file()
