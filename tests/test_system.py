import json
import math
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from conftest import FIXED
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

import local.fast.choose
from local.checkpoint import load_model
from local.config import parse_conf
from local.fast.training import TrainingForward
from local.models import make_model
from local.system import MusicSystem
from local.tools.choices import MEMORY
from local.tools.command_line import UserError
from local.train.checkpoints import BestCheckpoints
from local.train.display import ProgressBar, ProgressLines
from local.train.epochs import EpochStatistics, GradientNorms, SkippedSteps, StopAtMaxSteps
from local.train.loaders import EpochSampler

FLAGS = ["--root", "X", *FIXED, *"--N 8 --L 8 --B 8 --H 8 --X 2 --R 1 --sample_rate 8000".split()]


def make_batches(items: int, length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(items, 2, 2, length, generator=generator)
    return TensorDataset(targets.sum(1), targets)


def make_system(conf: dict, kind: type[MusicSystem] = MusicSystem) -> MusicSystem:
    torch.manual_seed(0)
    model = make_model(conf)
    return kind(
        model,
        torch.optim.Adam(model.parameters(), lr=conf["optim"]["lr"], fused=True),
        torch.nn.L1Loss(),
        DataLoader(make_batches(8, 400), batch_size=2),
        DataLoader(make_batches(3, 700)),
        config=conf,
    )


def fit(system: MusicSystem, exp_dir, epochs=1, callbacks=(), resume=None, **options) -> pl.Trainer:
    defaults = dict(logger=False, enable_progress_bar=False, gradient_clip_val=5.0)
    training = system.config["training"]
    callbacks = [
        *(BestCheckpoints(exp_dir, training["keep_best"]), StopAtMaxSteps(training["max_steps"])),
        *(SkippedSteps(training["max_skipped_steps"]), EpochStatistics(), *callbacks),
    ]
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        default_root_dir=exp_dir,
        **{**defaults, **options},
    )
    trainer.fit(system, ckpt_path=resume, weights_only=False)
    return trainer


@pytest.mark.smoke
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


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, bool]]:
    """(memory, compiled) of every TrainingForward that a system makes; in truth none compiles."""
    made = []

    def make(model, memory, compiled, kernels):
        made.append((memory, compiled))
        return TrainingForward(model, memory)

    monkeypatch.setattr(local.fast.choose, "TrainingForward", make)
    return made


@pytest.mark.parametrize("memory", MEMORY)
def test_training_is_that_of_the_plain_model(tmp_path, made, memory):
    weights = {}
    for fast in ("no", "auto"):
        system = make_system(parse_conf([*FLAGS, "--memory", memory, "--fast", fast]))
        fit(system, tmp_path / fast)
        weights[fast] = torch.nn.utils.parameters_to_vector(system.parameters())
        assert made == ([(memory, False)] if fast == "auto" else [])
    torch.testing.assert_close(weights["auto"], weights["no"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "compiled", "said"),
    [("", True, 0), ("OSError: no compiler", False, 1)],
    ids=["works", "fails"],
)
def test_compile_yes_trains_without_a_compiler_that_fails(
    tmp_path, made, monkeypatch, capsys, fault, compiled, said
):
    monkeypatch.setattr(local.fast.choose, "find_compiler_fault", lambda device: fault)
    conf = parse_conf([*FLAGS, "--compile", "yes"])
    assert fit(make_system(conf), tmp_path, epochs=2).global_step == 8
    assert made == [("some", compiled)]
    assert capsys.readouterr().out.count("does not work here") == said


@pytest.mark.parametrize("setting", ["auto", "no"])
def test_nothing_is_compiled_on_a_cpu_unasked(tmp_path, made, monkeypatch, setting):
    monkeypatch.setattr(
        local.fast.choose, "find_compiler_fault", lambda device: pytest.fail("tried")
    )
    fit(make_system(parse_conf([*FLAGS, "--compile", setting])), tmp_path)
    assert made == [("some", False)]


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


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, for which a GPU would have to be waited."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class ReadsPerBatch(pl.Callback):
    """Keeps the count at the start of every batch, which comes after the logging of the last."""

    def __init__(self, reads: Reads):
        self.reads, self.counts = reads, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts.append(self.reads.count)


@pytest.mark.parametrize("bar", [ProgressBar, ProgressLines])
def test_nothing_is_read_from_the_device_between_log_intervals(tmp_path, monkeypatch, bar):
    monkeypatch.setattr(ProgressBar, "READ", math.inf)
    monkeypatch.setattr(ProgressBar, "DRAW", 0.0)
    system = make_system(parse_conf(FLAGS))
    system.train_loader = DataLoader(make_batches(60, 400), batch_size=2)
    with Reads() as reads:
        per_batch = ReadsPerBatch(reads)
        fit(
            system,
            tmp_path,
            callbacks=[bar(), GradientNorms(), per_batch],
            enable_progress_bar=True,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=5,
            accumulate_grad_batches=2,
        )
    counts = torch.tensor(per_batch.counts).diff()
    assert counts.nonzero().flatten().tolist() == [9, 19]
    assert counts.max() <= 5


class SpoiledSystem(MusicSystem):
    """The losses of the batches in `spoiled` are not finite."""

    def common_step(self, batch, batch_nb, train=True):
        loss = super().common_step(batch, batch_nb, train)
        return loss * math.nan if train and batch_nb in self.spoiled else loss


def test_a_step_whose_gradients_are_not_finite_is_skipped_and_counted(tmp_path, capsys):
    class Weights(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights = torch.nn.utils.parameters_to_vector(pl_module.parameters())
            self.seen.append(weights.detach().clone())

    system = make_system(parse_conf(FLAGS), SpoiledSystem)
    system.spoiled = {1}
    weights = Weights()
    trainer = fit(system, tmp_path, callbacks=[weights])
    first, second, third, _ = weights.seen
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert third.isfinite().all()
    assert trainer.callback_metrics["skipped_steps"] == 1
    assert "; 1 step skipped, the gradients were not finite" in capsys.readouterr().out


@pytest.mark.parametrize("spoiled", [set(), {1}], ids=["all finite", "one skipped"])
def test_the_norms_of_an_epoch_are_those_before_clipping(tmp_path, spoiled):
    class Norms(pl.Callback):
        seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = [parameter.grad for parameter in pl_module.parameters()]
            self.seen.append(torch.nn.utils.get_total_norm(grads).item())

    system = make_system(parse_conf(FLAGS), SpoiledSystem)
    system.spoiled = spoiled
    options = dict(callbacks=[GradientNorms(), Norms()], gradient_clip_val=1e-4)
    trainer = fit(system, tmp_path, accumulate_grad_batches=2, **options)
    seen = [norm for norm in Norms.seen if math.isfinite(norm)]
    assert len(seen) == 2 - len(spoiled)
    logged = trainer.callback_metrics
    assert logged["grad_norm"].item() == pytest.approx(sum(seen) / len(seen))
    assert logged["grad_norm_max"].item() == pytest.approx(max(seen))


@pytest.mark.parametrize("mix", ["yes", "no"])
def test_the_sdr_of_validation_is_the_mean_over_the_tracks_in_which_a_target_sounds(tmp_path, mix):
    names = ("vocals", "accompaniment") if mix == "yes" else ("vocals", "bass", "drums", "other")
    flags = ["--mix_background", mix, "--C", str(len(names)), "--norm_type", "gLN"]
    system = make_system(parse_conf([*FLAGS, *flags]))
    targets = torch.randn(3, len(names), 2, 700, generator=torch.Generator().manual_seed(2))
    targets[1, 0] = targets[:, -1] = 0
    mixtures = targets.sum(1)
    system.train_loader = DataLoader(TensorDataset(mixtures, targets))
    system.val_loader = DataLoader(TensorDataset(mixtures, targets))
    logged = fit(system, tmp_path).callback_metrics
    with torch.no_grad():
        estimates = torch.cat([system.model.eval()(mixture[None]) for mixture in mixtures])
    energy = (targets.square().sum((2, 3)) / (targets - estimates).square().sum((2, 3))).log10()
    for index, name in enumerate(names):
        heard = [track for track in range(3) if targets[track, index].any()]
        expected = sum(10 * energy[track, index].item() for track in heard)
        expected = expected / len(heard) if heard else math.nan
        found = logged[f"val_sdr_{name}"].item()
        assert found == pytest.approx(expected, abs=1e-2, nan_ok=True)


def test_a_model_that_has_diverged_is_not_kept(tmp_path):
    class Diverge(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                torch.nn.init.constant_(pl_module.model.decoder.basis_signals.weight, math.nan)

    with pytest.raises(
        UserError, match="val_loss of epoch 1 is not finite: the model has diverged"
    ):
        fit(make_system(parse_conf(FLAGS)), tmp_path, 3, callbacks=[Diverge()])
    assert load_model(tmp_path / "best_model.pth").samplerate == 8000  # it would refuse NaN
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


class Items(Dataset):
    """Items as an EpochSampler asks for them."""

    def __init__(self, items: TensorDataset):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, position: tuple[int, int]):
        return self.items[position[1]]


@pytest.mark.parametrize(
    ("most", "spoiled", "epoch", "skipped", "first"),
    [
        (100, range(12), 0, 6, 0),  # no step of an epoch
        (3, range(4, 12), 0, 4, 2),  # found at the next interval
        (5, range(6, 12), None, None, None),  # two steps too few
    ],
)
def test_a_run_that_stands_still_ends_and_names_the_items(
    tmp_path, most, spoiled, epoch, skipped, first
):
    system = make_system(parse_conf([*FLAGS, "--max_skipped_steps", str(most)]), SpoiledSystem)
    system.spoiled = spoiled
    items, sampler = Items(make_batches(24, 400)), EpochSampler(24, seed=0)
    system.train_loader = DataLoader(items, batch_size=2, sampler=sampler)
    options = dict(accumulate_grad_batches=2, log_every_n_steps=2)
    if epoch is None:
        assert fit(system, tmp_path, **options).callback_metrics["skipped_steps"] == 3
        return
    with pytest.raises(UserError) as error:
        fit(system, tmp_path, **options)
    shown = ", ".join(map(str, sampler.find_items(4 * first, 4 * first + 4)))
    assert f"no step of the last {skipped} had finite gradients" in str(error.value)
    assert f"in epoch {epoch} was of items {shown} (--seed 0)" in str(error.value)
    assert all(parameter.isfinite().all() for parameter in system.parameters())


def test_gradients_are_clipped_at_their_true_norm_under_a_scaler(tmp_path):
    class Norms(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.seen += [torch.nn.utils.get_total_norm(grads).item()] if grads else []

    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))
    # Autocast rounds, and what is under test is the scaling.
    scaled.autocast_context_manager = nullcontext
    norms, weights = {}, {}
    for name, plugins in {"plain": [], "scaled": [scaled]}.items():
        system, seen = make_system(parse_conf(FLAGS)), Norms()
        fit(system, tmp_path / name, callbacks=[seen], plugins=plugins, gradient_clip_val=1e-3)
        norms[name] = seen.seen
        weights[name] = torch.nn.utils.parameters_to_vector(system.parameters())
    assert norms["plain"] == pytest.approx([1e-3] * 3, rel=1e-2)
    assert norms["scaled"] == pytest.approx(norms["plain"], rel=1e-5)
    torch.testing.assert_close(weights["scaled"], weights["plain"], rtol=1e-5, atol=1e-6)
