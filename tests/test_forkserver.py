"""A forked program behaves as a new Python, and is chosen only where it does."""

import os
import signal
import subprocess

import pytest
from conftest import ROOT, run_python, start_python
from forkserver import ForkedProcess

PIPES = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    "code, status",
    [
        ("print('out')", 0),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit(300)", 44),
        ("import sys; print('out'); sys.exit('error')", 1),
        ("import atexit; atexit.register(print, 'end'); print('out'); 1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os; os._exit(7)", 7),
        ("import threading, time; threading.Timer(0.2, print, ['late']).start()", 0),
        ("import sys; print(sys.argv, repr(sys.path[0]), __name__)", 0),
        ("import os, sys; print(os.getcwd(), sys.stdout.seekable(), sys.stdin.read())", 0),
    ],
)
def test_a_program_ends_and_writes_as_in_a_new_python(code, status, monkeypatch):
    results = []
    monkeypatch.setenv("SET_BY_A_LIBRARY", "1")
    for own_process in (False, True):
        process = start_python("-c", code, "a", own_process=own_process, **PIPES)
        assert isinstance(process, ForkedProcess) != own_process
        stdout, stderr = process.communicate("in", timeout=60)
        assert process.returncode == status
        results.append((stdout, [line for line in stderr.splitlines() if line[:1] != " "]))
    assert results[0] == results[1]


@pytest.mark.smoke
def test_scripts_and_modules_find_what_is_beside_them(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = __name__")
    code = "import sys, beside; print(__name__, __file__, sys.argv, sys.path[0], __spec__ is None)"
    (tmp_path / "program.py").write_text(code)
    for args in ([tmp_path / "program.py", "x"], ["program.py"], ["-m", "program", "x"]):
        forked, new = (run_python(*args, cwd=tmp_path, own_process=own) for own in (False, True))
        assert forked.returncode == 0, forked.stderr
        assert forked.stdout == new.stdout


def test_a_program_starts_without_modules_of_the_project():
    code = (
        "import sys\n"
        "files = (getattr(module, '__file__', None) or '' for module in sys.modules.values())\n"
        "print([file for file in files if file.startswith(sys.argv[1]) and '.venv' not in file])"
    )
    assert run_python("-c", code, ROOT).stdout == "[]\n"


@pytest.mark.parametrize(
    "args, variables",
    [(["-W", "error", "-c", "pass"], {}), (["-c", "pass"], {"RANK": "1"})],
    ids=["flag", "variable"],
)
def test_what_needs_a_new_python_is_run_by_one(args, variables):
    process = start_python(*args, env={**os.environ, **variables})
    assert isinstance(process, subprocess.Popen)
    assert process.wait(timeout=60) == 0


def test_threads_are_as_many_as_the_environment_says():
    code = "import torch; print(torch.get_num_threads())"
    assert run_python("-c", code).stdout == f"{os.environ['OMP_NUM_THREADS']}\n"
    assert run_python("-c", code, OMP_NUM_THREADS="2").stdout == "2\n"


def test_programs_draw_different_random_numbers():
    code = "import numpy, random; print(numpy.random.rand(), random.random())"
    first, second = (run_python("-c", code).stdout.split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]


def test_signals_reach_a_program_and_its_session():
    code = "import time; print('ready', flush=True); time.sleep(60)"
    process = start_python("-c", code, start_new_session=True, **PIPES)
    assert process.stdout.readline() == "ready\n"
    assert os.getpgid(process.pid) == process.pid
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert stderr.endswith("KeyboardInterrupt\n")


def test_a_long_input_and_output_do_not_wait_for_each_other():
    code = "import sys\nfor line in sys.stdin: sys.stdout.write(line), sys.stderr.write(line)"
    text = 100_000 * "0123456789\n"
    process = start_python("-c", code, **PIPES)
    assert process.communicate(text, timeout=60) == (text, text)


def test_a_program_that_reads_nothing_breaks_its_pipe_quietly():
    process = start_python("-c", "pass", **PIPES)
    assert process.communicate("x" * 10**6, timeout=60) == ("", "")
    assert process.returncode == 0
