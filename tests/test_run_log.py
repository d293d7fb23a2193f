import logging
import os
import re
import resource
import signal
import warnings

import pytest
from conftest import RATE, TINY_RUN, run_command, write_times, write_track

import train
from local.system import MusicSystem
from local.tools.command_line import UserError
from local.tools.progress import report, say
from local.train.run_log import kept_log

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def read_log(exp_dir) -> str:
    """Without the times, of which every line has one."""
    lines = (exp_dir / "train.log").read_text().splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    return "".join(f"{re.sub(STAMP, '', line, count=1)}\n" for line in lines)


def flags(exp_dir, corpus, *more) -> list[str]:
    return [*map(str, ["--exp_dir", exp_dir, "--root", corpus, *TINY_RUN, *more])]


@pytest.mark.smoke
def test_what_a_run_prints_is_in_its_log(corpus, tmp_path):
    result = run_command("train.py", *flags(tmp_path / "run", corpus, "--epochs", 2))
    assert result.returncode == 0, result.stderr
    printed = re.sub(f"^{STAMP}", "", result.stdout, flags=re.MULTILINE)
    assert read_log(tmp_path / "run") == printed
    for words in ("model ", "code ", "epoch 0: ", "epoch 1: ", "trained for 2 epochs"):
        assert re.search(f"^{words}", printed, re.MULTILINE)


def test_interrupted_and_resumed_runs_share_a_log(corpus, tmp_path, monkeypatch, error_of):
    def step(system, *args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return done(system, *args)

    arguments = flags(tmp_path / "run", corpus, "--checkpoint_every", "1steps")
    calls, done = [], MusicSystem.training_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(MusicSystem, "training_step", step)
        train.main(arguments)
    before = (tmp_path / "run" / "train.log").read_text()
    assert "SIGTERM" in before and " interrupted in epoch 0" in before
    (newest,) = (tmp_path / "run" / "checkpoints").glob("last-*-step=2.ckpt")
    damaged = newest.read_bytes()[:-99]
    newest.write_bytes(damaged)
    train.main(arguments)
    after = (tmp_path / "run" / "train.log").read_text()
    assert after.startswith(before)
    added = after[len(before) :]
    for words in (f"warning: {newest}: not a checkpoint", " resumes ", " trained for 1 epoch"):
        assert words in added
    # Nothing is left to do: nothing is written.
    times = write_times(tmp_path / "run")
    train.main(flags(tmp_path / "run", corpus))
    error_of(train.main, *flags(tmp_path / "run", corpus, "--epochs", 3, "--seed", 9))
    assert write_times(tmp_path / "run") == times


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "error: out of memory in training"),
        (RuntimeError("something else"), "Traceback"),
    ],
    ids=["known", "unknown"],
)
def test_what_ends_a_run_is_in_its_log(corpus, tmp_path, monkeypatch, error, words):
    def fail(*args):
        warnings.warn("from a library", stacklevel=1)
        logging.getLogger("some.library").warning("logged by a library")
        raise error

    monkeypatch.setattr(MusicSystem, "training_step", fail)
    with pytest.raises((SystemExit, RuntimeError)), pytest.warns(UserWarning, match="library"):
        train.main(flags(tmp_path / "run", corpus))
    log = read_log(tmp_path / "run")
    for found in (words, "UserWarning: from a library", "logged by a library", str(error)):
        assert found in log


def test_a_run_that_is_refused_writes_no_log(tmp_path, error_of):
    root = tmp_path / "root"
    write_track(root / "train" / "Leaf - Summerghost", rate=RATE)
    error_of(train.main, *flags(tmp_path / "run", root))
    assert not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path, capsys):
    with kept_log(tmp_path, True) as log:
        say("before it begins")
        assert not (tmp_path / "train.log").exists()
        log.begin()
        report("one line\nand another")
        size = (tmp_path / "train.log").stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8, limits[1]))  # as a full disk
        try:
            say("cut short")
            say("lost")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        say("there is room again")
    say("after its end")
    shown = capsys.readouterr()
    assert shown.err.count("train.log cannot be written") == 1
    assert shown.out.count("\n") == 7
    *lines, cut, last = (tmp_path / "train.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["before it begins", "one line", "and another"]
    assert len(cut) == 8
    assert last[20:] == "there is room again"


def test_other_ranks_write_nothing(tmp_path):
    with pytest.raises(UserError), kept_log(tmp_path, False):
        say("rank 1")
        raise UserError("rank 1")
    assert list(tmp_path.iterdir()) == []
