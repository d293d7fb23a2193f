import io
import re
import sys

import pytest

from local.tools import progress
from local.tools.progress import set_progress, show_progress

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
def stderr(monkeypatch) -> io.StringIO:
    """No terminal, whatever pytest was started from."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return sys.stderr


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which tests set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(clock, seconds: float, parts: int, leave: bool = False) -> None:
    with show_progress("song", 10.0 * parts, "s", leave=leave) as bar:
        for _ in range(parts):
            clock[0] += seconds / parts
            bar.update(10.0)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize(
    ("seconds", "parts", "minutes"),
    [(30, 30, 0), (0, 1, 0), (600, 1000, 9), (600, 5, 4), (601, 1000, 10), (86400, 9999, 1425)],
)
def test_without_a_terminal_there_is_at_most_a_line_a_minute(
    stderr, clock, seconds, parts, minutes, leave
):
    work(clock, seconds, parts, leave)
    lines = stderr.getvalue().splitlines()
    assert all(re.match(STAMP + "song: ", line) for line in lines)
    assert "\r" not in stderr.getvalue()
    assert len(lines) <= seconds // 60 + leave
    assert abs(len(lines) - leave - minutes) <= 20 * (seconds == 86400) + 1
    if leave:
        assert f"{10 * parts} of {10 * parts} s" in lines[-1]
