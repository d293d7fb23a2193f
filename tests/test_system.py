import json

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from local.checkpoint import load_model
from local.config import make_model, parse_conf
from local.system import BestCheckpoints, MusicSystem

FLAGS = "--root X --N 8 --L 8 --B 8 --H 8 --X 2 --R 1 --sample_rate 8000".split()


def make_batches(items: int, length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(items, 2, 2, length, generator=generator)
    return TensorDataset(targets.sum(1), targets)


def make_system(conf: dict, kind: type[MusicSystem] = MusicSystem) -> MusicSystem:
    torch.manual_seed(0)
    model = make_model(conf)
    return kind(
        model,
        torch.optim.Adam(model.parameters(), lr=conf["optim"]["lr"]),
        torch.nn.L1Loss(),
        DataLoader(make_batches(8, 400), batch_size=2),
        DataLoader(make_batches(3, 700)),
        config=conf,
    )


def fit(system: MusicSystem, exp_dir, epochs=1, callbacks=()) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[BestCheckpoints(exp_dir), *callbacks],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=exp_dir,
    )
    trainer.fit(system)
    return trainer


def test_val_loss_is_the_mean_l1_over_whole_items(tmp_path):
    system = make_system(parse_conf(FLAGS))
    trainer = fit(system, tmp_path)
    model = system.model.eval()
    with torch.no_grad():
        losses = [
            (model(mixture[None]) - targets[None]).abs().mean()
            for mixture, targets in make_batches(3, 700)
        ]
    expected = torch.stack(losses).mean().item()
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert {"loss", "train_loss", "items_per_second", "lr"} <= set(trainer.callback_metrics)


def test_runs_without_a_logger(tmp_path):
    assert fit(make_system(parse_conf(FLAGS)), tmp_path).global_step == 4


def test_max_steps_ends_with_a_validation_and_a_model(tmp_path):
    conf = parse_conf([*FLAGS, "--max_steps", "6"])
    trainer = fit(make_system(conf), tmp_path, epochs=50)
    assert trainer.global_step == 6
    assert len(json.loads((tmp_path / "best_k_models.json").read_text())) == 2


class GradedSystem(MusicSystem):
    """Its val_loss is what the test wants it to be."""

    def common_step(self, batch, batch_nb, train=True):
        if train:
            return super().common_step(batch, batch_nb, train)
        self.weights[self.current_epoch] = {
            name: tensor.clone() for name, tensor in self.model.state_dict().items()
        }
        return torch.tensor(self.scores[self.current_epoch])


def test_the_ten_best_are_kept_and_best_model_is_the_best_of_them(tmp_path):
    system = make_system(parse_conf(FLAGS), GradedSystem)
    system.scores = [0.9, 0.5, 0.7, 0.3, 0.8, 0.6, 0.2, 0.4, 1.0, 1.1, 1.2, 0.55]
    system.weights = {}
    fit(system, tmp_path, len(system.scores))
    kept = json.loads((tmp_path / "best_k_models.json").read_text())
    assert sorted(kept.values()) == pytest.approx(sorted(system.scores)[:10])
    assert sorted(kept) == sorted(
        f"checkpoints/{path.name}" for path in (tmp_path / "checkpoints").iterdir()
    )
    best = load_model(tmp_path / "best_model.pth").state_dict()
    for name, expected in system.weights[system.scores.index(0.2)].items():
        assert torch.equal(best[name], expected)


def test_best_model_is_there_from_the_first_epoch_on(tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(make_system(parse_conf(FLAGS)), tmp_path, 3, callbacks=[Stop()])
    assert load_model(tmp_path / "best_model.pth").samplerate == 8000
