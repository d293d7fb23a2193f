"""The changes of local/README.md, made in copies of the project: each takes effect."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_RUN, copy_project, run_python

from local import tasnet
from local.config import parse_conf
from local.models import make_model
from local.musdb18_dataset import SegmentDataset
from local.musdb18_tracks import SOURCES, find_tracks, split_validation
from local.train.loaders import EpochSampler

README = ROOT / "local" / "README.md"
RUN = [*TINY_RUN, "--max_steps", "1"]
GUIDE = README.read_text(encoding="utf-8").partition("\n## How to change\n")[2]
GUIDE = GUIDE.partition("\n## ")[0]


def read_changes() -> dict[str, list[str]]:
    """Title -> the diffs of the paragraphs that begin with it in bold."""
    parts = re.split(r"^\*\*(.+?)\*\*", GUIDE, flags=re.MULTILINE)[1:]
    diffs = [re.findall(r"```diff\n(.*?)```", text, re.DOTALL) for text in parts[1::2]]
    return dict(zip(parts[::2], diffs, strict=True))


CHANGES = read_changes()


def apply_diff(folder: Path, diff: str) -> None:
    """Makes a change whose hunks have no line numbers: what they replace must be there once."""
    header, _, body = diff.partition("\n")
    path = folder / header.removeprefix("+++ ")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for hunk in body.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
        new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
        assert text.count(old) == 1 or not (old or text), f"{path}: {old}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


class Changed:
    """A copy of the project with a change, and what a step of training there shows."""

    def __init__(self, folder: Path, diffs: list[str], corpus: Path):
        self.project, self.corpus = copy_project(folder / "project"), corpus
        for diff in diffs:
            apply_diff(self.project, diff)

    def train(self, *flags: str) -> str:
        """Trains a step; returns what it prints."""
        command = ["train.py", "--exp_dir", "exp/run", "--root", self.corpus, *RUN, *flags]
        result = run_python(*command, cwd=self.project)
        assert result.returncode == 0, result.stderr
        return result.stdout

    @property
    def loss(self) -> float:
        """That of the first batch."""
        path = self.project / "exp" / "run" / "logs" / "metrics.csv"
        rows = csv.DictReader(path.read_text().splitlines())
        return float(next(row["train_loss"] for row in rows if row["train_loss"]))

    def read_items(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first items, (mixture, targets), of what train.py trains on there."""
        code = f"""
import sys, torch, train
from pathlib import Path
from local.config import parse_conf
from local.musdb18_tracks import find_tracks
conf = parse_conf(sys.argv[1:])
tracks = find_tracks(Path(conf["data"]["root"]), "train", conf["data"]["sample_rate"], "wav")
train_set, _ = train.make_datasets(conf, tracks)
torch.save([train_set[0, index] for index in range({count})], "items.pt")
"""
        result = run_python("-c", code, "--root", self.corpus, *RUN, cwd=self.project)
        assert result.returncode == 0, result.stderr
        return torch.load(self.project / "items.pt")


@pytest.fixture
def change(tmp_path, corpus):
    """Makes a change of local/README.md by its title, or some of its diffs."""
    return lambda title, part=slice(None): Changed(tmp_path, CHANGES[title][part], corpus)


@pytest.fixture(scope="module")
def train_set(corpus) -> SegmentDataset:
    """What the unchanged project trains on."""
    training, _ = split_validation(find_tracks(corpus, "train", 8000, "wav"), None)
    return SegmentDataset(training, 4000, 4)


@pytest.fixture
def published_loss(train_set):
    """The loss of the first batch, computed with the model as the test process has it."""

    def compute(*flags: str, loss_func=F.l1_loss) -> float:
        conf = parse_conf([*RUN, *flags])
        pl.seed_everything(conf["training"]["seed"], verbose=False)
        model = make_model(conf).train()
        positions = list(EpochSampler(len(train_set)))[: conf["training"]["batch_size"]]
        items = zip(*(train_set[position] for position in positions), strict=True)
        mixtures, targets = map(torch.stack, items)
        return loss_func(model(mixtures), targets).item()

    return compute


def test_nothing_is_left_untested():
    assert list(CHANGES) == [
        "The block.",
        "The norm.",
        "The loss",
        "The optimizer",
        "The augmentation.",
        "The data set.",
        "The whole model",
    ]


def test_the_unchanged_project_trains_as_these_tests_compute(tmp_path, corpus, published_loss):
    unchanged = Changed(tmp_path, [], corpus)
    screen = unchanged.train()
    assert "L1Loss" in screen and "Adam(" in screen
    assert unchanged.loss == pytest.approx(published_loss(), rel=1e-5)


def test_the_block(change, published_loss, monkeypatch):
    edited, before = change("The block."), published_loss()
    assert "the model itself" in edited.train()
    monkeypatch.setattr(tasnet.TemporalBlock, "forward", lambda block, x: x + block.net(x) / 2)
    assert edited.loss == pytest.approx(published_loss(), rel=1e-5)
    assert edited.loss != pytest.approx(before, rel=1e-3)


def test_the_eps_of_the_norm(change, published_loss, monkeypatch):
    edited = change("The norm.", slice(0, 1))
    edited.train()
    before = published_loss()
    monkeypatch.setattr(tasnet, "EPS", 1e-5)
    assert abs(edited.loss - published_loss()) < 0.1 * abs(edited.loss - before)


def test_another_norm(change, published_loss, monkeypatch):
    edited, before = change("The norm.", slice(1, None)), published_loss()
    screen = edited.train("--norm_type", "IN")
    assert "IN" in screen and "the model itself" in screen
    monkeypatch.setattr(
        tasnet, "make_norm", lambda name, channels: torch.nn.InstanceNorm1d(channels)
    )
    assert edited.loss == pytest.approx(published_loss(), rel=1e-5)
    assert edited.loss != pytest.approx(before, rel=1e-3)


def test_the_loss(change, published_loss):
    edited = change("The loss")
    assert "HuberLoss" in edited.train("--loss", "huber")
    assert edited.loss == pytest.approx(published_loss(loss_func=F.huber_loss), rel=1e-5)


def test_the_optimizer(change):
    screen = change("The optimizer").train()
    assert "RAdam(" in screen and "factor=0.7" in screen


def test_the_augmentation(change, train_set):
    signs = set()
    for index, (_, targets) in enumerate(change("The augmentation.").read_items(8)):
        vocals, published = targets[0], train_set[0, index][1][0]
        assert torch.equal(vocals.abs(), published.abs())
        signs |= {sign for sign in (-1, 1) if torch.equal(vocals, sign * published)}
    assert signs == {-1, 1}


def test_the_data_set(change, train_set):
    edited = change("The data set.")
    edited.train()
    for index, (mixture, _) in enumerate(edited.read_items(8)):
        rng = np.random.default_rng((train_set.seed, 0, index))
        track = train_set.tracks[rng.integers(len(train_set.tracks))]
        start = rng.integers(track.length - train_set.length + 1)
        gain, swap = rng.uniform(0.25, 1.25), rng.random() < 0.5
        song = gain * sum(track.read(source) for source in SOURCES)
        expected = song[:: -1 if swap else 1, start : start + train_set.length]
        assert np.abs(mixture.numpy() - expected).max() < 1e-6


def test_the_whole_model(change):
    edited = change("The whole model")
    screen = edited.train("--model", "SmallNet")
    parameters = 32 * 2 * 9 + 32 + 4 * 32 * 9 + 4
    assert f"SmallNet, {parameters:,} parameters" in screen
    content = torch.load(edited.project / "exp" / "run" / "best_model.pth")
    assert content["model_name"] == "SmallNet"
