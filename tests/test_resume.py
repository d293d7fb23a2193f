import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, run_python, write_times

import train
from local.resume import find_changes, list_last, load_last, load_point
from local.system import MusicSystem

TIMES = {"items_per_second", "peak_memory_gib"}


def flags(exp_dir, corpus, *more, epochs=3) -> list[str]:
    """Of a run of 12 batches and 6 steps an epoch, with a checkpoint after every second step."""
    sizes = ["--samples_per_track", 16, "--batch_size", 4, "--aggregate", 2, "--epochs", epochs]
    sizes += ["--checkpoint_every", "2steps", "--accelerator", "cpu"]
    return [*map(str, ["--exp_dir", exp_dir, "--root", corpus, *TINY_RUN, *sizes, *more])]


def end_of(exp_dir: Path) -> tuple:
    """All that a run leads to, but for the time it took."""
    best = torch.load(exp_dir / "best_model.pth", weights_only=True)["state_dict"]
    with (exp_dir / "logs" / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    last = torch.load(list_last(exp_dir / "checkpoints")[0], weights_only=True)
    adam = last["optimizer_states"][0]["state"]
    return (
        {name: tensor.tolist() for name, tensor in best.items()},
        json.loads((exp_dir / "best_k_models.json").read_text()),
        sorted(path.name for path in (exp_dir / "checkpoints").iterdir()),
        {number: state["exp_avg"].tolist() for number, state in adam.items()},
        last["lr_schedulers"],
        rows,
    )


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    exp_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train.main(flags(exp_dir, corpus))
    return exp_dir


class PulledPlug(Exception):
    pass


def run_until(batch: int, arguments: list[str], monkeypatch) -> None:
    """Runs, and ends without notice after so many batches."""

    def count(system, *args):
        done(system, *args)
        seen.append(args)
        if len(seen) == batch:
            raise PulledPlug

    seen, done = [], MusicSystem.on_train_batch_end
    with monkeypatch.context() as patch, pytest.raises(PulledPlug):
        patch.setattr(MusicSystem, "on_train_batch_end", count)
        train.main(arguments)


@pytest.mark.parametrize("batches", [[1], [5], [11], [12], [13], [18], [24], [25], [36], [7, 3, 9]])
def test_a_run_that_goes_on_ends_as_if_undisturbed(
    batches, undisturbed, corpus, tmp_path, monkeypatch
):
    arguments = flags(tmp_path / "run", corpus)
    for batch in batches:
        run_until(batch, arguments, monkeypatch)
    train.main(arguments)
    assert end_of(tmp_path / "run") == end_of(undisturbed)


def test_loaders_with_processes_go_on_with_the_right_items(
    undisturbed, corpus, tmp_path, monkeypatch
):
    arguments = flags(tmp_path / "run", corpus, "--num_workers", 2)
    for batch in (5, 9, 14):
        run_until(batch, arguments, monkeypatch)
    train.main(arguments)
    assert end_of(tmp_path / "run") == end_of(undisturbed)


# Kills the process that runs it at the nth call of a function.
KILL = """
import os, signal, sys
import torch
import train

def kill_at_last(*args, **kwargs):
    calls.append(args)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)

calls, function = [], {function}
{function} = kill_at_last
torch.set_num_threads({threads})
train.main({arguments!r})
"""


@pytest.mark.parametrize(
    ("function", "number"),
    [("os.replace", 2), ("os.replace", 9), ("torch.save", 4), ("os.fsync", 7), ("os.unlink", 3)],
)
def test_killed_while_it_writes_it_goes_on(function, number, undisturbed, corpus, tmp_path):
    arguments = flags(tmp_path / "run", corpus)
    code = KILL.format(
        function=function, number=number, arguments=arguments, threads=torch.get_num_threads()
    )
    assert run_python("-c", code).returncode == -9
    train.main(arguments)
    assert end_of(tmp_path / "run") == end_of(undisturbed)


def test_a_moved_run_goes_on(undisturbed, corpus, tmp_path, monkeypatch):
    run_until(20, flags(tmp_path / "before", corpus), monkeypatch)
    shutil.move(tmp_path / "before", tmp_path / "after")
    train.main(flags(tmp_path / "after", corpus))
    assert end_of(tmp_path / "after") == end_of(undisturbed)


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, corpus, capsys):
    before = write_times(undisturbed)
    train.main(flags(undisturbed, corpus))
    assert f"{undisturbed} is finished, after 3 epochs" in capsys.readouterr().out
    after = write_times(undisturbed)
    assert after == before


def test_more_epochs_extend_a_run(undisturbed, corpus, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "extended")
    train.main(flags(tmp_path / "extended", corpus, epochs=4))
    train.main(flags(tmp_path / "long", corpus, epochs=4))
    assert end_of(tmp_path / "extended") == end_of(tmp_path / "long")


def test_other_settings_are_refused_or_recorded(corpus, tmp_path, error_of, monkeypatch):
    exp_dir = tmp_path / "run"
    run_until(14, flags(exp_dir, corpus), monkeypatch)
    changed = flags(exp_dir, corpus, "--lr", 0.01, "--num_workers", 1)
    error = error_of(train.main, *changed, "--seed", 5)
    for words in ("2 faults", "--lr: 0.0005 before, 0.01 now", "--seed: 0 before, 5 now"):
        assert words in error
    assert "--resume_with_changes" in error
    train.main([*changed, "--resume_with_changes"])
    assert "epoch: 1\n" in (exp_dir / "changes.yml").read_text()
    assert "--lr: 0.0005 before, 0.01 now" in (exp_dir / "changes.yml").read_text()


def test_a_run_that_learned_nothing_starts_anew_with_any_settings(corpus, tmp_path, monkeypatch):
    run_until(1, flags(tmp_path / "run", corpus), monkeypatch)
    train.main(flags(tmp_path / "run", corpus, "--lr", 0.01, epochs=1))
    train.main(flags(tmp_path / "new", corpus, "--lr", 0.01, epochs=1))
    assert end_of(tmp_path / "run") == end_of(tmp_path / "new")


def test_what_may_change_freely(corpus, tmp_path):
    train.main(flags(tmp_path / "run", corpus, epochs=1))
    (newest, *_) = list_last(tmp_path / "run" / "checkpoints")
    point = load_point(newest)
    more = ["--num_workers", 3, "--devices", 1, "--checkpoint_every", "2 min"]
    conf = train.parse_conf(flags(tmp_path / "elsewhere", tmp_path, *more, epochs=9))
    train.take_options(conf)
    assert find_changes(conf, point["so_far"]["surroundings"], point) == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", None])
def test_a_damaged_checkpoint_is_set_aside(
    content, undisturbed, corpus, tmp_path, monkeypatch, capsys
):
    arguments = flags(tmp_path / "run", corpus)
    run_until(20, arguments, monkeypatch)
    newest, before = list_last(tmp_path / "run" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-999] if content is None else content)
    train.main([*arguments, "--check"])
    assert newest.is_file()
    capsys.readouterr()
    train.main(arguments)
    printed = capsys.readouterr().out
    assert f"warning: {newest}: no checkpoint to go on from" in printed
    assert f"from {before}" in printed
    damaged = newest.with_suffix(".damaged")
    assert damaged.is_file()
    damaged.unlink()
    assert end_of(tmp_path / "run") == end_of(undisturbed)


def test_never_and_a_checkpoint_by_name(undisturbed, corpus, tmp_path, error_of):
    error = error_of(train.main, *flags(undisturbed, corpus, "--resume", "never"))
    assert "holds a run already" in error
    error = error_of(train.main, *flags(tmp_path / "run", corpus, "--resume", tmp_path / "none"))
    assert "none: no checkpoint to go on from" in error
    (best, *_) = (undisturbed / "checkpoints").glob("epoch=0*.ckpt")
    error = error_of(train.main, *flags(tmp_path / "run", corpus, "--resume", best))
    assert "no checkpoint to go on from" in error
    assert not (tmp_path / "run").exists()


def test_another_folder_can_start_from_a_checkpoint(undisturbed, corpus, tmp_path):
    point = list_last(undisturbed / "checkpoints")[1]
    train.main(flags(tmp_path / "run", corpus, "--resume", point))
    best, expected = (
        torch.load(exp_dir / "best_model.pth", weights_only=True)["state_dict"]
        for exp_dir in (tmp_path / "run", undisturbed)
    )
    assert all(torch.equal(best[name], expected[name]) for name in expected)


def test_only_two_checkpoints_to_go_on_from_are_kept(undisturbed):
    folder = undisturbed / "checkpoints"
    assert [path.name for path in list_last(folder)] == [
        "last-epoch=3-step=18.ckpt",
        "last-epoch=2-step=16.ckpt",
    ]
    path, point = load_last(folder)
    assert path.name == "last-epoch=3-step=18.ckpt"
    assert point["finished"] == {"epochs": 3, "early": False}


@pytest.mark.parametrize("every", ["", "5", "min", "-3 min", "5 hours", "1e3 steps"])
def test_how_often_must_be_said_with_its_unit(every, corpus, tmp_path, error_of):
    error = error_of(train.main, *flags(tmp_path, corpus, "--checkpoint_every", every))
    assert f"--checkpoint_every must be such as '30 min' or '500 steps', got '{every}'" in error


def test_two_processes_go_on_as_if_undisturbed(corpus, tmp_path):
    (tmp_path / "valid.txt").write_text("Leaf - Summerghost\nZeno - Signs")

    def run(script: Path, exp_dir: Path) -> int:
        arguments = flags(exp_dir, corpus, "--devices", 2, "--valid_tracks", tmp_path / "valid.txt")
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--rdzv_backend", "c10d"]
        launch += ["--rdzv_endpoint", "localhost:0"]
        return run_python(*launch, script, *arguments).returncode

    kill = tmp_path / "kill.py"
    code = KILL.replace("train.main({arguments!r})", "train.main()")
    kill.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        + code.format(function="os.fsync", number=3, threads=1)
    )
    assert run(kill, tmp_path / "killed") != 0
    assert list_last(tmp_path / "killed" / "checkpoints")
    for name in ("killed", "undisturbed"):
        assert run(ROOT / "train.py", tmp_path / name) == 0
    assert end_of(tmp_path / "killed") == end_of(tmp_path / "undisturbed")
