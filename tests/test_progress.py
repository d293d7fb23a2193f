import contextlib
import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ENVIRONMENT, ROOT, TINY_RUN

import eval
import train
from local import demo_musdb18, separate, stems
from local.tools import progress
from local.tools.progress import Lines, copied_to, report, say, set_progress, show_progress

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def no_flags():
    set_progress(quiet=False, progress=False)
    yield
    set_progress(quiet=False, progress=False)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which tests set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def show_work(clock=None, seconds=0.0, parts=10, leave=False, total: float | None = 0) -> str:
    """What stderr gets, which is no terminal, of work that takes so long."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        with show_progress("song", parts if total == 0 else total, "s", leave=leave) as bar:
            for _ in range(parts):
                if clock:
                    clock[0] += seconds / parts
                bar.update()
    return stderr.getvalue()


@pytest.mark.smoke
@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize(
    ("seconds", "parts", "minutes"),
    [(0, 1, 0), (59, 59, 0), (600, 600, 9), (600, 4, 3), (90, 3, 1), (36_000, 36_000, 599)],
)
def test_without_a_terminal_there_is_at_most_a_line_a_minute(clock, seconds, parts, minutes, leave):
    shown = show_work(clock, seconds, parts, leave)
    lines = shown.splitlines()
    assert all(re.match(STAMP + "song: ", line) for line in lines)
    assert "\r" not in shown
    # Work that leaves no line of its own may have one at its very end.
    assert len(lines) - leave in (minutes, minutes + (not leave))
    if leave:
        assert f"{parts} of {parts} s" in lines[-1]
        assert "left" not in lines[-1]


def test_a_line_tells_how_much_is_left(clock):
    line = show_work(clock, 180, parts=3).splitlines()[0]
    assert re.fullmatch(STAMP + "song: 1 of 3 s in 01:00, about 02:00 left", line)


def test_what_was_done_before_says_nothing_of_the_speed(clock, capsys):
    lines = Lines("epoch 3", 100, "batches", n=90)
    clock[0] += 60
    lines.update(5, note=lambda: "loss 0.5")
    shown = capsys.readouterr().err
    assert "epoch 3: 95 of 100 batches in 01:00, about 01:00 left, loss 0.5\n" in shown


def test_a_note_is_made_for_a_line_alone():
    Lines("epoch", 10, "batches").update(note=lambda: pytest.fail("read from the device"))


def test_an_unknown_length_and_work_that_fails(clock):
    assert re.fullmatch(
        STAMP + "song: 3 s in 00:30\n", show_work(clock, 30, 3, leave=True, total=None)
    )
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(ValueError):
        with show_progress("song", 10, "s", leave=True):
            raise ValueError
    assert stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("terminal", "term", "flags", "has_bars"),
    [
        (True, "xterm", {}, True),
        (True, "dumb", {}, False),
        (True, "xterm", {"quiet": True}, False),
        (False, "xterm", {}, False),
        (False, "xterm", {"progress": True}, True),
        (False, "dumb", {"progress": True}, True),
    ],
)
def test_where_bars_are_drawn(monkeypatch, terminal, term, flags, has_bars):
    set_progress(**{"quiet": False, "progress": False, **flags})
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    assert progress.has_bars() is has_bars
    with show_progress("song", 10, "s", scale=0.1) as bar:
        bar.update(10)
    assert ("\r" in sys.stderr.getvalue()) is has_bars


def test_quiet_shows_no_progress_but_what_is_said(clock, capsys):
    set_progress(quiet=True, progress=False)
    assert show_work(clock, 600, 600, leave=True) == ""
    say("results")
    report("a result")
    assert re.fullmatch(f"results\n{STAMP}a result\n", capsys.readouterr().out)


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stderr", [None, Full()], ids=["closed", "full"])
def test_a_stderr_that_cannot_be_written_does_not_end_the_work(stderr, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    with show_progress("song", 2, "s", leave=True) as bar:
        clock[0] += 100
        bar.update()
    assert bar.n == 1


def test_reports_have_the_time_unless_a_terminal_shows_them(monkeypatch):
    for stream, start in ((Terminal(), ""), (io.StringIO(), STAMP)):
        monkeypatch.setattr(sys, "stdout", stream)
        kept = []
        with copied_to(kept.append):
            report("epoch 0")
        report("epoch 1")
        assert re.fullmatch(f"{start}epoch 0\n{start}epoch 1\n", stream.getvalue())
        assert kept == ["epoch 0"]


COMMANDS = {
    "train.py": train.main,
    "eval.py": eval.main,
    "separate": separate.main,
    "stems": stems.main,
    "demo_musdb18": demo_musdb18.main,
}


@pytest.mark.smoke
@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_and_progress_exclude_one_another(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        COMMANDS[command](["--quiet", "--progress"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "--quiet" in error and "--progress" in error
    assert error.count("\n") == 1


def run_on_terminal(*command) -> tuple[str, str]:
    """What a command prints on a stdout that is a pipe, and on a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows, columns
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**ENVIRONMENT, "TERM": "xterm"},
        text=True,
        cwd=ROOT,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return process.communicate()[0], shown.decode()


def test_bars_go_to_a_terminal_and_not_into_the_log(corpus, tmp_path):
    flags = ["--exp_dir", tmp_path / "run", "--root", corpus, *TINY_RUN, "--samples_per_track", 60]
    log, terminal = run_on_terminal("train.py", *flags)
    assert "\r" not in log
    assert re.search(rf"^{STAMP}epoch 0: ", log, re.MULTILINE)
    assert "Epoch 0:" in terminal and "\r" in terminal
    assert "\r" not in (tmp_path / "run" / "train.log").read_text()
