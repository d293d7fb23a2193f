import csv
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chaos import EVENTS
from conftest import (
    ROOT,
    TINY_RUN,
    run_command,
    run_python,
    slow,
    start_python,
    start_training,
    write_times,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import AtomicCounter

import train
from local.config import OPTIONS, parse_conf
from local.musdb18_dataset import SegmentDataset
from local.system import MusicSystem
from local.tools.command_line import UserError
from local.tools.weights import load_weights_only
from local.train.checkpoints import BestCheckpoints, LastCheckpoints, list_last
from local.train.loaders import EpochSampler
from local.train.resume import find_changes, load_last_checkpoint, load_newest

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
        read_scalars(exp_dir / "tensorboard"),
    )


def read_scalars(folder: Path) -> dict[str, list]:
    """What TensorBoard shows, but for times."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in TIMES
    }


@pytest.fixture(scope="module", autouse=True)
def names_in_order():
    """TensorBoard reads files of a second by name, where the tenth of a process precedes the ninth.
    No process but this one has ten.
    """
    event_file_writer._global_uid = AtomicCounter(10_000)


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
def test_a_resumed_run_ends_as_if_undisturbed(batches, undisturbed, corpus, tmp_path, monkeypatch):
    arguments = flags(tmp_path / "run", corpus)
    for batch in batches:
        run_until(batch, arguments, monkeypatch)
    train.main(arguments)
    assert end_of(tmp_path / "run") == end_of(undisturbed)


def test_loaders_with_workers_resume_with_the_right_items(
    undisturbed, corpus, tmp_path, monkeypatch
):
    arguments = flags(tmp_path / "run", corpus, "--num_workers", 2)
    for batch in (5, 9, 14):
        run_until(batch, arguments, monkeypatch)
    train.main(arguments)
    assert end_of(tmp_path / "run") == end_of(undisturbed)


def test_random_states_are_resumed(corpus, tmp_path, monkeypatch):
    """None are drawn in a step as it is."""

    def draw(system, *args):
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return step(system, *args)

    drawn, step = [], MusicSystem.training_step
    monkeypatch.setattr(MusicSystem, "training_step", draw)
    train.main(flags(tmp_path / "whole", corpus))
    expected, drawn = drawn, []
    run_until(17, flags(tmp_path / "run", corpus), monkeypatch)
    assert drawn == expected[:17]
    drawn.clear()
    train.main(flags(tmp_path / "run", corpus))
    assert drawn == expected[16:]


@pytest.mark.parametrize(
    "place", ["training_step", "on_validation_epoch_start", "on_train_epoch_end"]
)
def test_a_run_that_got_a_signal_resumes(place, undisturbed, corpus, tmp_path, monkeypatch, capsys):
    def hear(system, *args):
        calls.append(args)
        if len(calls) == (2 if place == "on_validation_epoch_start" else 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return done(system, *args)

    calls, done = [], getattr(MusicSystem, place)
    with monkeypatch.context() as patch:
        patch.setattr(MusicSystem, place, hear)
        if place == "on_train_epoch_end":  # nothing was left to do
            train.main(flags(tmp_path / "run", corpus))
        else:
            with pytest.raises(SystemExit) as exit_:
                train.main(flags(tmp_path / "run", corpus))
            assert exit_.value.code == 143
            (newest, *_) = list_last(tmp_path / "run" / "checkpoints")
            error = capsys.readouterr().err
            assert "\ninterrupted in epoch " in error
            assert error.endswith(f"the same command resumes from {newest}\n")
    train.main(flags(tmp_path / "run", corpus))
    assert end_of(tmp_path / "run") == end_of(undisturbed)


# Killed

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def newest_step(exp_dir: Path) -> int:
    """Of the last checkpoint, 0 where there is none yet."""
    steps = (int(path.stem.split("=")[-1]) for path in list_last(exp_dir / "checkpoints"))
    return next(steps, 0)


def start_chaos(jobs: list, folder: Path) -> subprocess.Popen:
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests" / "chaos.py"
    return start_python(script, folder / "jobs.json", stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def undisturbed_by_chaos(corpus, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """A run in one thread, and how often each event came."""
    folder = tmp_path_factory.mktemp("chaos")
    exp_dir = str(folder / "run")
    output, _ = start_chaos(
        [[exp_dir, flags("X", corpus)[2:], "", 0]], folder / "job"
    ).communicate()
    assert json.loads(output) == [0]
    return folder / "run", json.loads((folder / "run.json").read_text())


def test_killed_at_any_point_it_resumes(undisturbed_by_chaos, corpus, tmp_path):
    expected, counts = undisturbed_by_chaos
    rng = random.Random(0)
    points = [(event, rng.randint(1, counts[event])) for event in EVENTS * 4][:20]
    if "RECIPE_SLOW_TESTS" not in os.environ:
        points = points[: len(EVENTS)]
    jobs = []
    for number, point in enumerate(points):
        exp_dir = str(tmp_path / str(number))
        jobs += [
            [exp_dir, flags("X", corpus)[2:], *point],
            [exp_dir, flags("X", corpus)[2:], "", 0],
        ]
    half = len(points) // 2 * 2
    shares = [start_chaos(jobs[:half], tmp_path / "a"), start_chaos(jobs[half:], tmp_path / "b")]
    statuses = sum((json.loads(share.communicate()[0]) for share in shares), [])
    assert statuses == [-signal.SIGKILL, 0] * len(points)
    for number, point in enumerate(points):
        assert end_of(tmp_path / str(number)) == end_of(expected), point


@pytest.mark.smoke
def test_a_moved_run_resumes(undisturbed, corpus, tmp_path, monkeypatch):
    run_until(20, flags(tmp_path / "before", corpus), monkeypatch)
    shutil.move(tmp_path / "before", tmp_path / "after")
    train.main(flags(tmp_path / "after", corpus))
    assert end_of(tmp_path / "after") == end_of(undisturbed)


@pytest.mark.smoke
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
    for words in ("--lr: 0.0005 before, 0.01 now", "--seed: 0 before, 5 now"):
        assert words in error
    assert "other settings; name another --exp_dir, or resume with --resume_with_changes:" in error
    train.main([*changed, "--resume_with_changes"])
    assert "epoch: 1\n" in (exp_dir / "changes.yml").read_text()
    assert "--lr: 0.0005 before, 0.01 now" in (exp_dir / "changes.yml").read_text()


def test_a_run_that_learned_nothing_starts_again_with_any_settings(corpus, tmp_path, monkeypatch):
    run_until(1, flags(tmp_path / "run", corpus), monkeypatch)
    train.main(flags(tmp_path / "run", corpus, "--lr", 0.01, epochs=1))
    train.main(flags(tmp_path / "new", corpus, "--lr", 0.01, epochs=1))
    assert end_of(tmp_path / "run") == end_of(tmp_path / "new")


def test_what_may_change_freely(corpus, tmp_path):
    train.main(flags(tmp_path / "run", corpus, epochs=1))
    (newest, *_) = list_last(tmp_path / "run" / "checkpoints")
    content = load_last_checkpoint(newest)
    more = ["--num_workers", 3, "--devices", 1, "--checkpoint_every", "2 min"]
    conf = parse_conf(flags(tmp_path / "elsewhere", tmp_path, *more, epochs=9))
    for option in OPTIONS:
        del conf["main_args"][option]
    assert find_changes(conf, content["run"]["inputs"], content) == []


def test_a_resumed_run_may_keep_fewer_or_more_of_the_best(corpus, undisturbed, tmp_path):
    exp_dir = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    scores = json.loads((exp_dir / "best_k_models.json").read_text())
    train.main(flags(exp_dir, corpus, "--keep_best", 1, epochs=4))
    (kept,) = json.loads((exp_dir / "best_k_models.json").read_text())
    assert kept == min(scores, key=scores.get) or kept.startswith("checkpoints/epoch=3-")
    assert [path.name for path in exp_dir.glob("checkpoints/epoch=*")] == [Path(kept).name]
    train.main(flags(exp_dir, corpus, "--keep_best", 2, epochs=5))
    assert len(list(exp_dir.glob("checkpoints/epoch=*"))) == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", None])
def test_a_damaged_checkpoint_is_renamed(
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
    printed = capsys.readouterr()
    assert f"warning: {newest}: not a checkpoint to resume from" in printed.err
    assert f"from {before}" in printed.out
    damaged = newest.with_suffix(".damaged")
    assert damaged.is_file()
    damaged.unlink()
    assert end_of(tmp_path / "run") == end_of(undisturbed)


def test_a_run_whose_last_checkpoints_are_all_damaged_is_kept(
    undisturbed, corpus, tmp_path, error_of
):
    exp_dir = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    for path in list_last(exp_dir / "checkpoints"):
        path.write_bytes(b"")
    for _ in range(2):
        error = error_of(train.main, *flags(exp_dir, corpus, epochs=4))
        assert "holds a run, and no last-*.ckpt to resume it from; name another" in error
    for name in ("best_model.pth", "logs/metrics.csv", "best_k_models.json", "conf.yml"):
        assert (exp_dir / name).read_bytes() == (undisturbed / name).read_bytes()


def test_never_and_a_checkpoint_by_name(undisturbed, corpus, tmp_path, error_of):
    error = error_of(train.main, *flags(undisturbed, corpus, "--resume", "never"))
    assert "holds a run already" in error
    error = error_of(train.main, *flags(tmp_path / "run", corpus, "--resume", tmp_path / "none"))
    assert "--resume must be auto, never or a last-*.ckpt; no such file: " in error
    (best, *_) = (undisturbed / "checkpoints").glob("epoch=0*.ckpt")
    error = error_of(train.main, *flags(tmp_path / "run", corpus, "--resume", best))
    assert "not a checkpoint to resume from" in error
    assert not (tmp_path / "run").exists()


def test_another_folder_can_start_from_a_checkpoint(undisturbed, corpus, tmp_path):
    path = list_last(undisturbed / "checkpoints")[1]
    train.main(flags(tmp_path / "run", corpus, "--resume", path))
    best, expected = (
        torch.load(exp_dir / "best_model.pth", weights_only=True)["state_dict"]
        for exp_dir in (tmp_path / "run", undisturbed)
    )
    assert all(torch.equal(best[name], expected[name]) for name in expected)


def test_only_the_last_two_checkpoints_are_kept(undisturbed):
    folder = undisturbed / "checkpoints"
    assert [path.name for path in list_last(folder)] == [
        "last-epoch=3-step=18.ckpt",
        "last-epoch=2-step=17.ckpt",
    ]
    path, content = load_newest(folder, rename=True)
    assert path.name == "last-epoch=3-step=18.ckpt"
    assert content["run"]["finished"] == {"epochs": 3, "early": False}


@pytest.mark.parametrize("every", ["", "5", "min", "-3 min", "5 hours", "1e3 steps"])
def test_how_often_must_be_said_with_its_unit(every, corpus, tmp_path, error_of):
    error = error_of(train.main, *flags(tmp_path, corpus, "--checkpoint_every", every))
    assert f"--checkpoint_every must look like '30 min' or '500 steps', got '{every}'" in error


# Other files


def test_a_run_of_single_steps_resumes_from_its_first(corpus, tmp_path, monkeypatch):
    """Killed when the first model is there, and no optimizer step but the first was begun."""

    def pull(best, *args):
        done(best, *args)
        raise PulledPlug

    done = BestCheckpoints.on_train_epoch_end
    run, whole = (flags(tmp_path / name, corpus, "--aggregate", 100) for name in ("run", "whole"))
    with monkeypatch.context() as patch, pytest.raises(PulledPlug):
        patch.setattr(BestCheckpoints, "on_train_epoch_end", pull)
        train.main(run)
    for arguments in (run, whole):
        train.main(arguments)
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_kept_from_a_run(undisturbed, corpus, tmp_path, error_of):
    exp_dir = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    before = write_times(exp_dir)
    (path, *_) = list_last(undisturbed / "checkpoints")
    error = error_of(train.main, *flags(exp_dir, corpus, "--resume", path, epochs=4))
    assert f"--resume {path}: {exp_dir} holds another run; name another --exp_dir" in error
    assert write_times(exp_dir) == before


def test_what_came_after_an_older_checkpoint_is_dropped(corpus, tmp_path, monkeypatch):
    exp_dir = tmp_path / "run"
    run_until(28, flags(exp_dir, corpus), monkeypatch)
    newest, older = list_last(exp_dir / "checkpoints")
    changed = flags(exp_dir, corpus, "--resume", older, "--lr", 0.01, "--resume_with_changes")
    run_until(1, changed, monkeypatch)
    assert list_last(exp_dir / "checkpoints")[0] == older
    assert not newest.exists()


@pytest.mark.parametrize("gone", ["best_model.pth", "checkpoints/epoch=*.ckpt", "logs/*"])
def test_files_that_were_deleted(gone, undisturbed, corpus, tmp_path, monkeypatch):
    exp_dir = tmp_path / "run"
    run_until(30, flags(exp_dir, corpus), monkeypatch)
    own = exp_dir / "checkpoints" / "epoch=1-step=12-for-paper.ckpt"
    own.write_text("kept")
    (exp_dir / "checkpoints" / ".last-epoch=2-step=99.ckpt.tmp").write_text("by a killed run")
    for path in exp_dir.glob(gone):
        if path != own:
            path.unlink()
    train.main(flags(exp_dir, corpus))
    assert own.read_text() == "kept"
    own.unlink()
    if gone.startswith("checkpoints"):  # they are no more, nor in the list
        kept = json.loads((exp_dir / "best_k_models.json").read_text())
        assert list(kept) == ["checkpoints/epoch=2-step=18.ckpt"]
        best, expected = (
            torch.load(folder / "best_model.pth", weights_only=True)["state_dict"]
            for folder in (exp_dir, undisturbed)
        )
        assert all(torch.equal(best[name], expected[name]) for name in expected)
    else:
        assert end_of(exp_dir) == end_of(undisturbed)


def test_batches_of_another_size_are_of_the_items_that_are_left(corpus, tmp_path, monkeypatch):
    def note(dataset, items):
        seen.extend(items)
        return read(dataset, items)

    seen, read = [], SegmentDataset.__getitems__
    exp_dir = tmp_path / "run"
    run_until(9, flags(exp_dir, corpus, epochs=1), monkeypatch)
    monkeypatch.setattr(SegmentDataset, "__getitems__", note)
    larger = ["--batch_size", 8, "--aggregate", 1, "--resume_with_changes"]
    train.main(flags(exp_dir, corpus, *larger, epochs=1))
    order = list(EpochSampler(48))
    assert seen == order[32:]


def test_two_runs_started_together_are_one(corpus, tmp_path):
    arguments = flags("X", corpus, epochs=100_000)[2:]
    started = [start_training(tmp_path / "run", *arguments, until=lambda: True) for _ in range(2)]
    while all(process.poll() is None for process in started):
        time.sleep(0.05)
    ended, running = sorted(started, key=lambda process: process.poll() is None)
    assert ended.returncode == 2
    assert "is in use: another run writes to it" in ended.stderr.read()
    running.kill()
    assert running.wait() == -signal.SIGKILL


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 70 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("batch", [5, 14, 24])
def test_a_run_resumes_when_a_full_disk_has_room_again(
    batch, small_disk, undisturbed, corpus, monkeypatch, capsys
):
    def fill(system, *args):
        done(system, *args)
        seen.append(args)
        if len(seen) == batch:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    filler, seen, done = small_disk / "filler", [], MusicSystem.on_train_batch_end
    arguments = flags(small_disk / "run", corpus)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(MusicSystem, "on_train_batch_end", fill)
        train.main(arguments)
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert f"train.py: error: {small_disk / 'run'} cannot be written (is the disk full?): " in error
    assert "\nthe same command resumes from " in error
    filler.unlink()
    train.main(arguments)
    assert end_of(small_disk / "run") == end_of(undisturbed)


# What else may have changed


def test_the_tracks_are_part_of_a_run(undisturbed, own_corpus, error_of):
    shutil.rmtree(own_corpus / "train" / "Zeno - Signs")
    error = error_of(train.main, *flags(undisturbed, own_corpus, epochs=4))
    assert "\n  training tracks: Zeno - Signs (14400 samples) before, no other now\n" in error
    assert "validation tracks" not in error


def test_another_number_of_devices_is_refused_or_recorded(corpus, tmp_path, error_of, monkeypatch):
    exp_dir = tmp_path / "run"
    (tmp_path / "valid.txt").write_text("Leaf - Summerghost\nZeno - Signs")
    shared = flags(exp_dir, corpus, "--valid_tracks", tmp_path / "valid.txt", epochs=2)
    run_until(5, shared, monkeypatch)
    error = error_of(train.main, *shared, "--devices", 2)
    assert "other settings; name another --exp_dir, or resume with --resume_with_changes:" in error
    assert "\n  devices: 1 x cpu before, 2 x cpu now\n" in error
    more = ["--devices", 2, "--batch_size", 2, "--resume_with_changes"]
    result = run_command("train.py", *shared, *more)
    assert result.returncode == 0, result.stderr
    assert "resumes    in epoch 0, batch 4, from " in result.stdout
    assert "devices: 1 x cpu before, 2 x cpu now" in (exp_dir / "changes.yml").read_text()


def test_another_model_is_not_resumed(undisturbed, corpus, error_of):
    changed = flags(undisturbed, corpus, "--B", 12, "--lr", 0.1, "--resume_with_changes")
    error = error_of(train.main, *changed)
    assert "name another --exp_dir:\n  --B: 8 before, 12 now\n  --lr: 0.0005 before" in error


def test_a_changed_lr_is_that_of_the_optimizer(corpus, tmp_path, monkeypatch):
    arguments = flags(tmp_path / "run", corpus)
    run_until(14, arguments, monkeypatch)
    for _ in range(2):  # the second time, nothing has changed
        train.main([*arguments, "--lr", "0.01", "--resume_with_changes"])
        (newest, *_) = list_last(tmp_path / "run" / "checkpoints")
        content = torch.load(newest, weights_only=True)
        assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01


def test_a_place_that_is_no_more(corpus, tmp_path, error_of, monkeypatch):
    exp_dir = tmp_path / "run"
    run_until(23, flags(exp_dir, corpus), monkeypatch)
    error = error_of(train.main, *flags(exp_dir, corpus, epochs=1))
    assert "run: the run resumes in epoch 1, and ends before that with --epochs 1" in error
    fewer = ["--samples_per_track", 8, "--resume_with_changes"]
    error = error_of(train.main, *flags(exp_dir, corpus, *fewer))
    assert "epoch 1 after 40 items, and with these settings an epoch has 24; name another" in error


# Damaged and hostile files


class Evil:
    """Unpickled, it leaves a file where it says."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["zip", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused(save, corpus, tmp_path, error_of, capsys):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    path, trace = folder / "last-epoch=0-step=1.ckpt", tmp_path / "trace"
    with path.open("wb") as file:
        save({"so_far": Evil(trace), "state_dict": {}}, file)
    error = error_of(train.main, *flags(tmp_path / "new", corpus, "--resume", path))
    assert f"{path}: not a checkpoint to resume from: " in error
    train.main(flags(tmp_path / "run", corpus, epochs=1))
    assert capsys.readouterr().err == (
        f"warning: {path}: not a checkpoint to resume from: it is not made of plain data alone;"
        " renamed to last-epoch=0-step=1.damaged\n"
    )
    assert path.with_suffix(".damaged").is_file()
    assert not trace.exists()


def test_a_flipped_bit_is_found_or_does_no_harm(undisturbed, tmp_path):
    (newest, *_) = list_last(undisturbed / "checkpoints")
    content, expected = newest.read_bytes(), load_weights_only(newest)
    damaged, rng, found = tmp_path / newest.name, np.random.default_rng(0), 0
    for place in rng.integers(len(content), size=300):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.write_bytes(flipped)
        try:
            load_last_checkpoint(damaged)
        except UserError as error:
            assert str(error).startswith(f"{damaged}: not a checkpoint to resume from: ")
            found += 1
        else:
            loaded = load_weights_only(damaged)
            assert repr(loaded) == repr(expected)
            assert all(map(torch.equal, *(p["state_dict"].values() for p in (loaded, expected))))
    assert found > 100


# Together


def test_ranks_ask_each_other_once_a_second(tmp_path, monkeypatch):
    """In 20 s of steps of 10 ms, of which the clock of the first rank alone counts."""

    def all_reduce(tensor, op):
        asked.append(trainer.global_step)
        torch.maximum(tensor, torch.tensor(others), out=tensor)

    others, asked, now = [0, 0, 0], [], [0.0]
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    last = LastCheckpoints(tmp_path, "0.1 min", SimpleNamespace(signum=0))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(
        world_size=2, global_step=0, ckpt_path=None, strategy=strategy, is_global_zero=True
    )
    last.on_train_start(trainer, None)
    answers = []
    for trainer.global_step in range(2000):
        now[0] += 0.01
        answers.append(last._exchange(trainer))
    assert 19 <= len(asked) <= 24
    assert answers.index((0, True)) in range(599, 700)
    others[0] = signal.SIGTERM
    while answers[-1] != (signal.SIGTERM, True):
        trainer.global_step += 1
        answers.append(last._exchange(trainer))
    assert trainer.global_step < 2100


SIGNALS = {  # whether to all processes of a run, and the status with which it ends
    "Ctrl-C": (signal.SIGINT, True, 130),
    "kill": (signal.SIGTERM, False, 143),
    "kill -9": (signal.SIGKILL, False, -9),
    "SLURM": (signal.SIGTERM, True, 143),
    "SLURM in time": (signal.SIGUSR1, True, 138),
}


def train_in_one_thread(exp_dir: Path, flags: list[str]) -> subprocess.CompletedProcess:
    result = run_command("train.py", "--exp_dir", exp_dir, *flags, **ONE_THREAD)
    assert (result.returncode, result.stderr) == (0, "")
    return result


def stop_and_resume(exp_dir: Path, flags: list[str], name: str, step: int, more=()) -> None:
    """Starts the command, sends it a signal when it has saved that step, and starts it again."""
    signum, to_all, status = SIGNALS[name]
    process = start_training(
        exp_dir,
        *flags,
        *more,
        until=lambda: newest_step(exp_dir) >= step,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
    )
    (os.killpg if to_all else os.kill)(process.pid, signum)
    try:
        assert process.wait(timeout=120) == status, process.stderr.read()
    finally:
        with suppress(ProcessLookupError):  # of those that it started
            os.killpg(process.pid, signal.SIGKILL)
    assert "resumes    in epoch " in train_in_one_thread(exp_dir, flags).stdout


@pytest.fixture(scope="module")
def long_flags(corpus) -> list[str]:
    """Flags of a run of 3 epochs of 48 steps."""
    return flags("X", corpus, "--samples_per_track", 128)[2:]


@pytest.fixture(scope="module")
def undisturbed_command(long_flags, tmp_path_factory) -> Path:
    exp_dir = tmp_path_factory.mktemp("command") / "run"
    train_in_one_thread(exp_dir, long_flags)
    return exp_dir


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *[(name, 30) for name in ("Ctrl-C", "kill", "kill -9")],
        *[pytest.param(name, 3, marks=slow) for name in SIGNALS],
        *[pytest.param(name, 60, marks=slow) for name in ("Ctrl-C", "kill", "kill -9")],
    ],
)
def test_the_command_resumes_after_a_signal(name, step, undisturbed_command, long_flags, tmp_path):
    stop_and_resume(tmp_path / "run", long_flags, name, step, more=["--num_workers", 2])
    assert end_of(tmp_path / "run") == end_of(undisturbed_command)


@pytest.fixture(scope="module")
def flags_of_two(corpus, tmp_path_factory) -> list[str]:
    """Flags of a run of 3 epochs of 32 steps, of two processes."""
    names = tmp_path_factory.mktemp("names") / "valid.txt"
    names.write_text("Leaf - Summerghost\nZeno - Signs")
    more = ["--devices", 2, "--valid_tracks", names, "--samples_per_track", 256]
    return flags("X", corpus, *more)[2:]


@pytest.fixture(scope="module")
def undisturbed_two(flags_of_two, tmp_path_factory) -> Path:
    exp_dir = tmp_path_factory.mktemp("two") / "run"
    train_in_one_thread(exp_dir, flags_of_two)
    return exp_dir


@slow
@pytest.mark.parametrize(("name", "step"), [("Ctrl-C", 3), ("kill", 20), ("kill -9", 40)])
def test_two_processes_resume_after_a_signal(name, step, undisturbed_two, flags_of_two, tmp_path):
    stop_and_resume(tmp_path / "run", flags_of_two, name, step)
    assert end_of(tmp_path / "run") == end_of(undisturbed_two)


SLOW_DISK = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train
from local.train.checkpoints import LastCheckpoints

class OnSlowDisk(LastCheckpoints):
    PAUSE = 0  # the other process hears of the signal at the next step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 40 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)
        super().on_train_batch_start(trainer, *args)

    def _save(self, trainer, batch_idx):
        if self.interrupts.signum and trainer.is_global_zero:
            time.sleep(7)
        super()._save(trainer, batch_idx)

import local.train.callbacks
local.train.callbacks.LastCheckpoints = OnSlowDisk
train.main()
"""


@slow
def test_no_process_ends_before_the_first_has_saved(undisturbed_two, flags_of_two, tmp_path):
    """Every 5 s Lightning looks whether one has ended, and kills the others if so."""
    exp_dir, script = tmp_path / "run", tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK.format(root=str(ROOT)))
    result = run_python(script, "--exp_dir", exp_dir, *flags_of_two, **ONE_THREAD)
    assert (result.returncode, newest_step(exp_dir)) == (143, 40), result.stderr
    train_in_one_thread(exp_dir, flags_of_two)
    assert end_of(exp_dir) == end_of(undisturbed_two)
