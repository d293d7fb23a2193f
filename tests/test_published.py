"""The published training recipe: what a run is made of, and a run held to a plain PyTorch loop."""

import csv
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile as sf
import torch
import torch.nn.functional as F
from conftest import RATE, TRAIN_NAMES, write_corpus
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.optim.lr_scheduler import ReduceLROnPlateau

import train
from local.checkpoint import load_model
from local.config import parse_conf
from local.losses import LOSSES
from local.models import count_parameters, make_model
from local.musdb18_dataset import keep_batch
from local.musdb18_tracks import find_tracks
from local.train.loaders import EpochSampler

DEFAULTS = {
    "convtasnet": {
        **{"N": 256, "L": 20, "B": 256, "H": 512, "P": 3, "X": 10, "R": 4, "C": 2},
        **{"audio_channels": 2, "norm_type": "gLN", "causal": False, "mask_nonlinear": "relu"},
    },
    "training": {
        **{"epochs": 200, "batch_size": 4, "num_workers": 4, "half_lr": True, "early_stop": True},
        "aggregate": 2,
    },
    "optim": {"lr": 0.0005},
    "data": {
        **{"mix_background": True, "segment": 5.0, "samples_per_track": 64},
        "sample_rate": 44100,
    },
    "main_args": {"exp_dir": "exp/tmp"},
}
NON_CAUSAL = (
    "--exp_dir EXP --batch_size 4 --aggregate 2 --lr 0.0005 --root MUSDB18"
    " --sample_rate 44100 --segment 5.0 --samples_per_track 64"
).split()
CAUSAL = (
    "--exp_dir EXP --batch_size 4 --aggregate 1 --lr 0.0005 --root MUSDB18 --sample_rate 44100"
    " --segment 4.0 --samples_per_track 64 --causal True --n_src 2 --norm_type cLN"
).split()
# Appended to a published command; the last of two equal flags counts.
SMALL = (
    f"--N 16 --L 16 --B 8 --H 16 --X 2 --R 1 --sample_rate {RATE} --segment 0.5 --accelerator cpu"
).split()
VALIDATION = (TRAIN_NAMES[1], TRAIN_NAMES[3])
# Of machines with fewer cores than the published loaders have workers.
WARNING = "ignore:This DataLoader will create 4 worker processes"
pytestmark = [pytest.mark.filterwarnings(WARNING), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def valid_tracks(tmp_path_factory) -> Path:
    """A file for --valid_tracks."""
    path = tmp_path_factory.mktemp("valid") / "names.txt"
    path.write_text("\n".join(VALIDATION), encoding="utf-8")
    return path


def build(conf: dict) -> SimpleNamespace:
    """What train.py makes of a configuration before it trains."""
    data = conf["data"]
    tracks = find_tracks(Path(data["root"]), "train", data["sample_rate"], data["suffix"])
    train_set, valid_set = train.make_datasets(conf, tracks)
    trainer = train.make_trainer(conf, len(train_set), len(valid_set))
    system = train.make_system(conf, make_model(conf), train_set, valid_set)
    return SimpleNamespace(trainer=trainer, system=system, train_set=train_set, valid_set=valid_set)


@pytest.fixture
def build_published(corpus, valid_tracks, tmp_path):
    """Builds the published non-causal run, small, with flags of one's own."""

    def run(*flags: str) -> SimpleNamespace:
        here = [f"--exp_dir={tmp_path / 'run'}", f"--root={corpus}"]
        return build(
            parse_conf([*NON_CAUSAL, *SMALL, *here, f"--valid_tracks={valid_tracks}", *flags])
        )

    return run


def find_callbacks(trainer, kind: type) -> list:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


# The configuration


def assert_published(conf: dict, **changes) -> None:
    for section, keys in DEFAULTS.items():
        for key, default in keys.items():
            expected = changes.pop(key, default)
            assert conf[section][key] == expected, key
            assert type(conf[section][key]) is type(expected), key
    assert not changes


def test_every_published_key_has_its_published_default():
    assert_published(parse_conf([]))


def test_the_published_non_causal_command_is_read_as_published():
    conf = parse_conf(NON_CAUSAL)
    assert_published(conf, exp_dir="EXP")
    assert conf["data"]["root"] == "MUSDB18"
    assert count_parameters(conf) == 10_846_800


def test_the_published_causal_command_is_read_as_published():
    conf = parse_conf(CAUSAL)
    assert_published(conf, exp_dir="EXP", aggregate=1, segment=4.0, causal=True, norm_type="cLN")
    assert conf["data"]["root"] == "MUSDB18"
    assert count_parameters(conf) == 10_846_800


# What a run is made of


def test_the_loss_is_the_mean_absolute_error(build_published):
    loss = build_published().system.loss_func
    assert type(loss) is torch.nn.L1Loss
    assert loss.reduction == "mean"


def test_the_optimizer_is_adam_over_the_whole_model(build_published):
    system = build_published().system
    assert type(system.optimizer) is torch.optim.Adam
    (group,) = system.optimizer.param_groups
    settings = {"lr": 0.0005, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    settings |= {"amsgrad": False, "maximize": False, "decoupled_weight_decay": False}
    assert {name: group[name] for name in settings} == settings
    expected = {id(parameter) for parameter in system.model.parameters()}
    assert {id(parameter) for parameter in group["params"]} == expected


def test_the_learning_rate_is_halved_where_val_loss_stands_still(build_published):
    system = build_published().system
    (optimizer,), (schedule,) = system.configure_optimizers()
    scheduler = schedule["scheduler"]
    assert optimizer is scheduler.optimizer is system.optimizer
    assert type(scheduler) is ReduceLROnPlateau
    expected = {"mode": "min", "factor": 0.5, "patience": 5, "cooldown": 0, "min_lrs": [0]}
    expected |= {"threshold": 1e-4, "threshold_mode": "rel", "eps": 1e-8}
    assert {name: getattr(scheduler, name) for name in expected} == expected
    once_per_epoch = {"interval": "epoch", "frequency": 1}  # Lightning's defaults, too
    assert {**once_per_epoch, **schedule} == {
        **once_per_epoch,
        **{"scheduler": scheduler, "monitor": "val_loss"},
    }


def test_the_learning_rate_stays_with_half_lr_no(build_published):
    system = build_published("--half_lr", "no").system
    assert system.scheduler is None
    assert system.configure_optimizers() is system.optimizer


def test_a_run_stops_early_by_val_loss(build_published):
    (stopper,) = find_callbacks(build_published().trainer, EarlyStopping)
    found = (stopper.monitor, stopper.mode, stopper.patience, stopper.min_delta)
    assert found == ("val_loss", "min", 20, 0)


def test_no_run_stops_early_with_early_stop_no(build_published):
    assert not find_callbacks(build_published("--early_stop", "no").trainer, EarlyStopping)


def test_the_ten_best_checkpoints_by_val_loss_are_kept(build_published):
    (keeper,) = find_callbacks(build_published().trainer, ModelCheckpoint)
    assert (keeper.monitor, keeper.mode, keeper.save_top_k) == ("val_loss", "min", 10)


def test_the_trainer_is_set_as_published(build_published):
    trainer = build_published().trainer
    assert trainer.max_epochs == 200
    assert trainer.max_steps == -1
    assert trainer.accumulate_grad_batches == 2
    assert trainer.gradient_clip_val == 5.0
    assert trainer.gradient_clip_algorithm in (None, "norm")  # None is Lightning's for the norm
    assert trainer.precision == "32-true"
    assert trainer.check_val_every_n_epoch == 1
    assert trainer.limit_train_batches == trainer.limit_val_batches == 1.0


def test_what_the_published_script_holds_fixed_can_be_set(build_published):
    flags = (
        "--optimizer adamw --weight_decay 0.1 --clip_norm 2 --lr_patience 3 --patience 7 --ema 0.9"
        " --keep_best 4 --mix_tracks no --gain_min 0.5 --gain_max 0.75 --swap 1"
    ).split()
    run = build_published(*flags)
    (group,) = run.system.optimizer.param_groups
    assert type(run.system.optimizer) is torch.optim.AdamW
    assert (group["weight_decay"], group["lr"], group["fused"]) == (0.1, 0.0005, True)
    assert run.system.scheduler.patience == 3
    assert run.trainer.gradient_clip_val == 2
    (stopper,) = find_callbacks(run.trainer, EarlyStopping)
    (keeper,) = find_callbacks(run.trainer, ModelCheckpoint)
    assert (stopper.patience, keeper.save_top_k) == (7, 4)
    assert len(find_callbacks(run.trainer, WeightAveraging)) == 1
    data = run.train_set
    assert (data.mix_tracks, data.gains, data.swap) == (False, (0.5, 0.75), 1)


@pytest.mark.parametrize(("name", "mode"), [("mse", "rel"), ("sdr", "abs"), ("si_sdr", "abs")])
def test_a_better_val_loss_is_one_below_in_any_unit(name, mode, build_published):
    """With "rel", -9.9999 dB would count as better than -10 dB."""
    system = build_published("--loss", name).system
    assert type(system.loss_func) is LOSSES[name]
    assert system.scheduler.threshold_mode == mode


def test_batches_are_of_shuffled_items_and_the_incomplete_one_is_dropped(build_published):
    run = build_published("--samples_per_track", "7")
    loader = run.system.train_loader
    assert loader.dataset is run.train_set
    assert (loader.batch_size, loader.drop_last, loader.num_workers) == (4, True, 4)
    orders = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)  # as Lightning does
        assert [len(batch) for batch in loader.batch_sampler] == [4, 4, 4]
        positions = list(loader.sampler)
        assert {found for found, _ in positions} == {epoch}
        orders.append([index for _, index in positions])
        assert sorted(orders[-1]) == list(range(14))
    assert len({tuple(order) for order in [*orders, range(14)]}) == 4


def test_validation_is_on_one_whole_track_after_the_other(build_published):
    run = build_published()
    loader = run.system.val_loader
    assert loader.dataset is run.valid_set
    assert list(loader.batch_sampler) == [[0], [1]]
    assert [track.name for track in run.valid_set.tracks] == sorted(VALIDATION)
    for (mixture, targets), track in zip(run.valid_set, run.valid_set.tracks, strict=True):
        assert mixture.shape == (2, track.length)
        assert targets.shape == (2, 2, track.length)


# A run, held to a plain loop
#
# Both compute in float32, but by other formulas, so they agree but for rounding. Errors are
# relative to how far the weights have come. They are below 1e-6 a few steps after the start (3e-5
# with BN, which divides by the spread of a channel). Later they grow: L1 and ReLU have kinks, and
# a sample that rounding puts on the other side of one moves the next step by 1e-4 of its length.
# The plain loop from weights that differ by 1e-7 ends up to 2e-3 away. A wrong optimizer shows
# early, a wrong scheduler only late; the least of these faults is ten times over its limit.

EARLY_LIMIT = 1e-4
LIMIT = 1e-2
LR = 0.014  # so large that a few dozen steps are a whole run
CASES = {
    "non-causal": NON_CAUSAL,
    "causal": [*CAUSAL, "--epochs", "8"],  # up to the first halving
    # The only norm that computes otherwise in training mode than in eval mode.
    "BN": [*NON_CAUSAL, "--norm_type", "BN", "--epochs", "2"],
}


@dataclass(frozen=True)
class Recipe:
    """The published one."""

    loss: object = F.l1_loss
    optimizer: object = partial(torch.optim.Adam, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    batch_size: int = 4
    drop_last: bool = True
    aggregate: int = 2
    clip: float = 5.0
    factor: float = 0.5
    patience: int = 5
    stop_after: int = 20


@dataclass
class Run:
    """What is left of a run: vectors of all weights, and a number per epoch."""

    last: Tensor
    best: Tensor
    val_loss: list[float]
    lr: list[float]


def train_plainly(model, train_set, valid_set, recipe: Recipe, epochs: int) -> Run:
    """The training loop as a textbook has it, without Lightning, asteroid and local.system."""
    optimizer = recipe.optimizer(model.parameters(), lr=LR)
    scheduler = ReduceLROnPlateau(optimizer, factor=recipe.factor, patience=recipe.patience)
    val_losses, lrs, best = [], [], None
    for epoch in range(epochs):
        lrs.append(optimizer.param_groups[0]["lr"])
        model.train()
        batches = draw_batches(train_set, epoch, recipe)
        for number, (mixtures, targets) in enumerate(batches, start=1):
            loss = recipe.loss(model(mixtures), targets) / recipe.aggregate
            loss.backward()
            # The last step of an epoch makes do with fewer batches, each of the same weight.
            if number % recipe.aggregate == 0 or number == len(batches):
                clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses = [recipe.loss(model(x[None]), y[None]).item() for x, y in valid_set]
        val_losses.append(sum(losses) / len(losses))
        scheduler.step(val_losses[-1])
        if val_losses[-1] == min(val_losses):
            best_epoch, best = epoch, to_vector(model)
        if epoch - best_epoch == recipe.stop_after:
            break
    return Run(to_vector(model), best, val_losses, lrs)


def draw_batches(train_set, epoch: int, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """The (mixtures, targets) of an epoch, of the run's own items in its order."""
    sampler = EpochSampler(len(train_set), seed=0)
    sampler.set_epoch(epoch)
    size, positions = recipe.batch_size, list(sampler)
    batches = [positions[start : start + size] for start in range(0, len(positions), size)]
    if recipe.drop_last and len(batches[-1]) < size:
        batches.pop()
    return [keep_batch(train_set.__getitems__(batch)) for batch in batches]


def to_vector(model) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


def read_run(exp_dir: Path) -> Run:
    """What train.py has left in a folder."""
    paths = (exp_dir / "checkpoints").glob("*.ckpt")
    last = max(paths, key=lambda path: int(re.search(r"step=(\d+)", path.name)[1]))
    with (exp_dir / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = [[float(row[name]) for row in rows if row[name]] for name in ("val_loss", "lr")]
    weights = (to_vector(load_model(path)) for path in (last, exp_dir / "best_model.pth"))
    return Run(*weights, *columns)


@pytest.fixture(scope="module")
def unlike_corpus(tmp_path_factory) -> Path:
    """A corpus on which every part of the recipe shows within seconds.

    Vocals and one of the other stems are exchanged in the validation tracks: the more a model
    learns, the worse it does there, so that val_loss is best early whatever rounding does. All is
    so loud that some gradients are longer than 5 and others are not.
    """
    root = write_corpus(tmp_path_factory.mktemp("unlike") / "corpus")
    for path in root.glob("train/*/*.wav"):
        audio, rate = sf.read(path, dtype="float32")
        sf.write(path, 300 * audio, rate, "FLOAT")
    for name in VALIDATION:
        vocals, other = (root / "train" / name / f"{stem}.wav" for stem in ("vocals", "other"))
        vocals.rename(vocals.with_name("spare"))
        other.rename(vocals)
        vocals.with_name("spare").rename(other)
    return root


@dataclass
class Case:
    """A run of train.py, and what a plain loop needs for the same."""

    exp_dir: Path
    conf: dict
    found: Run

    @property
    def best_epoch(self) -> int:
        return self.found.val_loss.index(min(self.found.val_loss))

    def make_model(self):
        torch.manual_seed(0)  # the seed of conf.yml
        return make_model(self.conf)

    def train_plainly(self, epochs: int | None = None, **changes) -> Run:
        built, training = build(self.conf), self.conf["training"]
        recipe = replace(Recipe(aggregate=training["aggregate"]), **changes)
        epochs = epochs or training["epochs"]
        return train_plainly(self.make_model(), built.train_set, built.valid_set, recipe, epochs)

    def find_error(self, expected: Tensor, found: Tensor) -> float:
        """Relative to how far the weights of the run have come."""
        return float((found - expected).norm() / (found - to_vector(self.make_model())).norm())


@pytest.fixture(scope="module")
def make_case(unlike_corpus, valid_tracks, tmp_path_factory):
    """Trains, once for each case. 3 batches are made of 14 items, and 2 items are left over."""
    cases = {}

    def run(name: str) -> Case:
        if name not in cases:
            exp_dir = tmp_path_factory.mktemp("runs") / name
            here = [f"--exp_dir={exp_dir}", f"--root={unlike_corpus}", f"--lr={LR}"]
            here += [f"--valid_tracks={valid_tracks}", "--samples_per_track=7", "--num_workers=0"]
            argv = [*CASES[name], *SMALL, *here]
            train.train(parse_conf(argv))
            cases[name] = Case(exp_dir, parse_conf(argv), read_run(exp_dir))
        return cases[name]

    return run


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_published_loop(make_case, name):
    case = make_case(name)
    found, expected, early = case.found, case.train_plainly(), case.best_epoch + 1
    assert early <= 2
    early_limit = EARLY_LIMIT if name != "BN" else 10 * EARLY_LIMIT
    assert found.lr == pytest.approx(expected.lr, rel=1e-6)
    assert found.val_loss[:early] == pytest.approx(expected.val_loss[:early], rel=EARLY_LIMIT)
    assert found.val_loss == pytest.approx(expected.val_loss, rel=LIMIT)
    assert case.find_error(expected.best, found.best) < early_limit
    assert case.find_error(expected.last, found.last) < LIMIT


def test_a_run_halves_its_learning_rate_and_stops(make_case):
    case = make_case("non-causal")
    better = case.best_epoch + 1
    assert len(case.found.lr) == better + 20
    halvings = [0] * (better + 6) + [1] * 6 + [2] * 6 + [3] * 2
    assert case.found.lr == pytest.approx([LR / 2**count for count in halvings], rel=1e-6)


def test_a_run_keeps_the_ten_best(make_case):
    case = make_case("non-causal")
    kept = json.loads((case.exp_dir / "best_k_models.json").read_text())
    assert sorted(kept.values()) == pytest.approx(sorted(case.found.val_loss)[:10], rel=1e-6)
    assert all((case.exp_dir / path).is_file() for path in kept)


WRONG_STEPS = {
    "MSE": dict(loss=F.mse_loss),
    "AdamW": dict(optimizer=torch.optim.AdamW),
    "betas": dict(optimizer=partial(torch.optim.Adam, betas=(0.9, 0.99))),
    "clip": dict(clip=1.0),
    "no clip": dict(clip=1e9),
    "aggregate": dict(aggregate=1),
    "drop_last": dict(drop_last=False),
}
WRONG_EPOCHS = {
    "factor": dict(factor=0.3),
    "patience": dict(patience=2),
    "early stop": dict(stop_after=7),
}


@pytest.mark.parametrize("part", WRONG_STEPS)
def test_the_early_limit_tells_a_wrong_step(make_case, part):
    case = make_case("non-causal")
    wrong = case.train_plainly(epochs=case.best_epoch + 1, **WRONG_STEPS[part])
    assert case.find_error(wrong.last, case.found.best) > 10 * EARLY_LIMIT


@pytest.mark.parametrize("part", WRONG_EPOCHS)
def test_the_limit_tells_a_wrong_course(make_case, part):
    case = make_case("non-causal")
    wrong = case.train_plainly(**WRONG_EPOCHS[part])
    assert case.find_error(wrong.last, case.found.last) > 10 * LIMIT
