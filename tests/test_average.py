"""--ema: what is averaged, validated and kept; resumed runs, bit for bit."""

import csv
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY_RUN
from test_resume import run_until, start_chaos
from torch import Tensor, nn

import train
from local.checkpoint import load_model
from local.inference import separate
from local.musdb18_dataset import TrackDataset
from local.musdb18_tracks import find_tracks, split_validation
from local.tools.weights import load_weights_only
from local.train.average import WeightAverage
from local.train.checkpoints import list_last

DECAY = 0.9
BN = ["--norm_type", "BN"]  # has statistics to average, and counts batches


def flags(exp_dir, corpus, *more, ema=DECAY, epochs=2) -> list[str]:
    """Of a run of 3 steps an epoch, with a checkpoint after every second."""
    sizes = ["--samples_per_track", 8, "--aggregate", 2, "--epochs", epochs]
    sizes += ["--lr", 0.01, "--checkpoint_every", "2 steps", "--accelerator", "cpu"]
    run = ["--exp_dir", exp_dir, "--root", corpus, *TINY_RUN, *sizes, *BN, "--ema", ema, *more]
    return list(map(str, run))


def load_last(exp_dir: Path) -> dict:
    return load_weights_only(list_last(exp_dir / "checkpoints")[0])


def end_of(exp_dir: Path) -> dict:
    """All that a run leads to, but for its times and its folder."""
    last = load_last(exp_dir)
    states = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    return {
        **{name: last[name] for name in states},
        "best": load_weights_only(exp_dir / "best_model.pth")["state_dict"],
        "scores": json.loads((exp_dir / "best_k_models.json").read_text()),
    }


def assert_same_end(exp_dir: Path, expected: Path) -> None:
    torch.testing.assert_close(end_of(exp_dir), end_of(expected), rtol=0, atol=0)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run, and the weights and buffers of its model after every optimizer step."""

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step > len(after):
                state = pl_module.model.state_dict()
                after.append({name: tensor.clone() for name, tensor in state.items()})

    def make_trainer(*args):
        trainer = make(*args)
        trainer.callbacks.append(Weights())
        return trainer

    after, make = [], train.make_trainer
    exp_dir = tmp_path_factory.mktemp("average") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_trainer", make_trainer)
        train.main(flags(exp_dir, corpus))
    return exp_dir, after


def test_it_is_the_average_of_the_weights_after_every_step(undisturbed):
    exp_dir, after = undisturbed
    last = load_last(exp_dir)
    assert len(after) == 6
    for name in after[0]:
        expected = after[0][name].double()
        for state in after[1:]:
            expected = DECAY * expected + (1 - DECAY) * state[name].double()
        if not after[0][name].is_floating_point():
            expected = after[-1][name].double()  # a count is no average
        average = last["state_dict"][f"model.{name}"]
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)
        weights = last["current_model_state"][f"model.{name}"]
        assert torch.equal(weights, after[-1][name])


def test_val_loss_computed_from_best_model_is_the_one_that_was_logged(undisturbed, corpus):
    exp_dir, _ = undisturbed
    model = load_model(exp_dir / "best_model.pth")
    _, tracks = split_validation(find_tracks(corpus, "train", model.samplerate), None)
    losses = [
        (separate(model, mixture, "full") - targets).abs().mean().item()
        for mixture, targets in TrackDataset(tracks)
    ]
    scores = json.loads((exp_dir / "best_k_models.json").read_text())
    assert sum(losses) / len(losses) == pytest.approx(min(scores.values()), rel=1e-5)
    with (exp_dir / "logs" / "metrics.csv").open(newline="") as file:
        logged = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert min(logged) == pytest.approx(min(scores.values()), rel=1e-5)
    best = load_model(exp_dir / min(scores, key=scores.get)).state_dict()
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("batches", [[5], [6], [7, 2], [12]])
def test_a_resumed_run_ends_as_if_undisturbed(batches, undisturbed, corpus, tmp_path, monkeypatch):
    arguments = flags(tmp_path / "run", corpus)
    for batch in batches:
        run_until(batch, arguments, monkeypatch)
    train.main(arguments)
    assert_same_end(tmp_path / "run", undisturbed[0])


def test_a_killed_run_ends_as_if_undisturbed(undisturbed, corpus, tmp_path):
    """At a step, within the write of a checkpoint, and before best_model.pth is renamed."""
    points, jobs = {"step": 5, "write": 4, "rename": 9}, []
    for event, number in points.items():
        run = [str(tmp_path / event), flags("X", corpus)[2:]]
        jobs += [[*run, event, number], [*run, "", 0]]
    output, _ = start_chaos(jobs, tmp_path / "jobs").communicate()
    assert json.loads(output) == [-signal.SIGKILL, 0] * len(points)
    for event in points:
        assert_same_end(tmp_path / event, undisturbed[0])


def test_more_epochs_extend_a_finished_run(corpus, undisturbed, tmp_path):
    train.main(flags(tmp_path / "run", corpus, epochs=1))
    train.main(flags(tmp_path / "run", corpus))
    assert_same_end(tmp_path / "run", undisturbed[0])


def test_a_run_that_ends_its_average_trains_its_weights(corpus, tmp_path):
    train.main(flags(tmp_path / "plain", corpus, ema=0))
    train.main(flags(tmp_path / "run", corpus, epochs=1))
    changed = flags(tmp_path / "run", corpus, "--resume_with_changes", ema=0)
    train.main(changed)
    found, expected = (load_last(tmp_path / name) for name in ("run", "plain"))
    assert "current_model_state" not in found
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)


def test_a_run_that_begins_an_average_trains_on(corpus, undisturbed, tmp_path):
    train.main(flags(tmp_path / "run", corpus, ema=0, epochs=1))
    train.main(flags(tmp_path / "run", corpus, "--resume_with_changes"))
    found, expected = end_of(tmp_path / "run"), end_of(undisturbed[0])
    name = "current_model_state"
    torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert found["averaging_state"]["n_averaged"] == 1 + 3  # from the weights that it had


def test_what_never_changes_is_its_own_average():
    """Of frozen weights, to the last bit; and a count stays one."""

    class System(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1000), requires_grad=False)
            self.register_buffer("count", torch.tensor(5))

    system, average = System(), WeightAverage(0.999)
    trainer = SimpleNamespace()
    average.setup(trainer, system, "fit")
    average.on_fit_start(trainer, system)
    for trainer.global_step in range(1, 9):
        average.on_train_batch_end(trainer, system, None, None, None)
    content = {"state_dict": system.state_dict()}
    average.on_save_checkpoint(trainer, system, content)
    assert content["averaging_state"]["n_averaged"] == 8
    assert torch.equal(content["state_dict"]["weight"], system.weight)
    assert content["state_dict"]["count"] == 5
