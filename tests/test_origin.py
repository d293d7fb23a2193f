import csv
import json
import os
import subprocess

import pytest
import torch
from conftest import ROOT, TINY_RUN, TRAIN_NAMES, write_track

import train
from local import demo_musdb18
from local.config import parse_conf
from local.musdb18_tracks import VALIDATION_TRACKS
from local.tracks.track import Place
from local.train import origin
from local.train.origin import find_commit, name_dataset
from local.train.recipe import describe_code


def make_places(root, names) -> list[Place]:
    return [Place(root / "train" / name, name, name, root, "train") for name in names]


def read_best(exp_dir) -> dict:
    return torch.load(exp_dir / "best_model.pth", weights_only=True)


@pytest.mark.smoke
def test_a_model_tells_what_made_it(experiment, corpus):
    content = read_best(experiment)
    infos = content["infos"]
    conf = parse_conf(["--exp_dir", str(experiment), "--root", str(corpus), *TINY_RUN])
    assert infos["configuration"]["convtasnet"] == conf["convtasnet"]
    assert infos["configuration"]["data"]["root"] == str(corpus)
    assert infos["configuration"]["training"]["epochs"] == 3
    assert set(infos["training_tracks"]) == set(TRAIN_NAMES) - {"Leaf - Summerghost"}
    assert infos["validation_tracks"] == ["Leaf - Summerghost"]
    assert infos["code"] == describe_code()
    assert infos["commit"] == find_commit()
    kept = json.loads((experiment / "best_k_models.json").read_text())
    best = min(kept, key=kept.get)
    assert infos["val_loss"] == kept[best]
    assert f"epoch={infos['epoch']}-" in best
    assert content["dataset"] == f"MUSDB18, and other tracks of {corpus}"
    assert [terms["title"] for terms in content["licenses"]] == ["MUSDB18"]


def test_a_model_of_ones_own_tracks_is_none_of_musdb18(tmp_path):
    root, names = tmp_path / "own", ("Me - One", "Me - Two")
    for seed, name in enumerate(names):
        write_track(root / "train" / name, seed=seed)
    (tmp_path / "valid.txt").write_text("Me - Two\n")
    flags = [*TINY_RUN, "--valid_tracks", str(tmp_path / "valid.txt")]
    train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(root), *flags])
    content = read_best(tmp_path / "run")
    assert "MUSDB18" not in content["dataset"] and str(root) in content["dataset"]
    assert content["licenses"] == []
    assert content["task"] == "music source separation"


def test_the_names_of_musdb18_are_those_of_its_150_tracks():
    names = origin.NAMES.read_text(encoding="utf-8").splitlines()
    assert len(set(names)) == len(names) == 150
    published = (ROOT / "local/comparison/published_scores.csv").read_text(encoding="utf-8")
    scored = {row["track"] for row in csv.DictReader(published.splitlines())}
    assert scored | set(VALIDATION_TRACKS) < set(names)


@pytest.mark.parametrize(
    ("tracks", "dataset"),
    [
        (VALIDATION_TRACKS, "MUSDB18"),
        (["Music Delta - Punk"], "MUSDB18"),  # no validation track of musdb
        (["zeno - signs"], "MUSDB18"),  # of the test split
        (["Me - One", VALIDATION_TRACKS[5]], "MUSDB18, and other tracks of ROOT"),
        (["Me - One"], "tracks of ROOT"),
        ([], "tracks of ROOT"),
    ],
)
def test_which_data_are_musdb18(tracks, dataset, tmp_path):
    found = name_dataset([tmp_path], make_places(tmp_path, tracks))
    assert found == dataset.replace("ROOT", str(tmp_path))


def test_the_demo_is_not_musdb18_although_its_validation_tracks_are_called_so(tmp_path):
    train_names = [*demo_musdb18.VALID_NAMES, "Artist 01 - Song 1"]
    demo_musdb18.claim(tmp_path / "demo", {"seed": 0})
    demo, own = tmp_path / "demo", tmp_path / "own"
    songs = make_places(demo, train_names)
    name = name_dataset([demo], songs)
    assert "demo" in name and "MUSDB18" not in name
    both = name_dataset([demo, own], songs + make_places(own, ["Me - One"]))
    assert str(own) in both and "MUSDB18" not in both
    musdb = make_places(own, VALIDATION_TRACKS[:1])
    assert name_dataset([demo, own], songs + musdb).startswith("MUSDB18, and other tracks of")


# The commit


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the files of a recipe, of which `find_commit` is asked."""
    (tmp_path / "local").mkdir()
    for name in ("train.py", "local/tasnet.py", "README.md"):
        (tmp_path / name).write_text("")
    run_git(tmp_path, "init", "-q")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-qm", "all")
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    find_commit.cache_clear()
    yield tmp_path
    find_commit.cache_clear()


def run_git(folder, *arguments) -> str:
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    return subprocess.run(
        ["git", "-C", folder, *author, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout.strip()


def test_the_commit_is_named(repository, monkeypatch):
    (repository / "README.md").write_text("another")  # which is no code
    monkeypatch.setenv("GIT_DIR", str(ROOT / "nowhere"))  # as in a hook
    assert find_commit() == run_git(repository, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["train.py", "local/tasnet.py", "local/new.py"])
def test_local_changes_are_said(repository, name):
    (repository / name).write_text("changed = 1\n")
    head = run_git(repository, "rev-parse", "HEAD")
    assert find_commit() == f"{head}, with local changes"


def test_a_copy_within_another_repository_has_no_commit(repository, monkeypatch):
    copy = repository / "copy"
    copy.mkdir()
    (copy / "train.py").write_text("")
    monkeypatch.setattr(origin, "ROOT", copy)
    assert find_commit() == "unknown"


def test_without_git_the_commit_is_unknown(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert find_commit() == "unknown"
