"""Run Python programs in processes that are forked after the slow imports.

A test that starts a command waits seconds for the imports of torch, Lightning and asteroid. Here a
server imports the libraries once, and nothing of the project, since tests also run edited copies of
it. For each program it forks a process, which behaves as a new Python would, except that

- libraries have read their environment variables and shown their warnings before,
- `sys.modules` is full,
- torch uses one thread, unless OMP_NUM_THREADS asks for more,
- `/proc/PID/cmdline` and the peak memory are those of the server.

`python tests/forkserver.py FD` is the server; FD is its end of a socket.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    *("asteroid", "asteroid.engine.system", "huggingface_hub", "matplotlib.figure", "musdb"),
    *("museval", "numpy", "pandas", "psutil", "pytorch_lightning", "safetensors.torch"),
    *("scipy.signal", "soundfile", "soxr", "stempeg", "tensorboard", "threadpoolctl", "torch"),
    *("torch.utils.tensorboard", "tqdm.auto", "truststore", "yaml"),
)
MESSAGE = struct.Struct("ci")  # b"p" and the number of the process, then b"s" and its status


# The side of the tests


class ForkServer:
    """Starts the server, with this environment; it ends when this process does."""

    FREE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # `become` sets these

    def __init__(self, environment: dict[str, str]):
        self._environment = {**environment, **dict.fromkeys(self.FREE, "1")}
        self._socket, end = socket.socketpair()
        with end:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(end.fileno())],
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[end.fileno()],
            )

    def can_run(self, args: list[str], env: dict[str, str]) -> bool:
        """Whether the program needs no flag of Python, and no variable that libraries may read."""
        is_flag = args[0].startswith("-") and args[0] not in ("-c", "-m")
        changed = {name for name, _ in env.items() ^ self._environment.items()}
        return not is_flag and changed <= set(self.FREE)

    def start(
        self,
        args: list[str],
        *,
        cwd: Path,
        env: dict[str, str],
        stdin=None,
        stdout=None,
        stderr=None,
        text: bool = True,
        start_new_session: bool = False,
    ) -> "ForkedProcess":
        """Starts `python *args`; the other arguments are those of `subprocess.Popen`.

        Raises:
            RuntimeError: the server has ended; its stderr says why.
        """
        request = {"args": args, "cwd": os.path.abspath(cwd), "env": dict(env)}
        request["start_new_session"] = start_new_session
        connection, end = socket.socketpair()
        with ExitStack() as sent:
            sent.enter_context(end)
            stdin, our_stdin = sent.enter_context(open_stream(stdin, 0, text))
            stdout, our_stdout = sent.enter_context(open_stream(stdout, 1, text))
            if stderr == subprocess.STDOUT:
                stderr = stdout
            stderr, our_stderr = sent.enter_context(open_stream(stderr, 2, text))
            try:
                socket.send_fds(self._socket, [b" "], [end.fileno(), stdin, stdout, stderr])
            except BrokenPipeError:
                raise RuntimeError("the fork server has ended") from None
        connection.sendall(f"{json.dumps(request)}\n".encode())
        return ForkedProcess(args, connection, our_stdin, our_stdout, our_stderr)


@contextmanager
def open_stream(target, number: int, text: bool) -> Iterator[tuple]:
    """(file descriptor for the program, our end of the pipe or None)."""
    ours, opened = None, None
    if target is None:
        target = number
    elif target == subprocess.DEVNULL:
        target = opened = os.open(os.devnull, os.O_RDWR)
    elif target == subprocess.PIPE:
        read, write = os.pipe()
        target = opened = read if number == 0 else write
        mode = ("w" if number == 0 else "r") + ("" if text else "b")
        ours = open(write if number == 0 else read, mode)
    try:
        yield (target if isinstance(target, int) else target.fileno()), ours
    finally:
        if opened is not None:
            os.close(opened)


class ForkedProcess:
    """A program that was started, used as a `subprocess.Popen`."""

    def __init__(self, args: list[str], connection: socket.socket, stdin, stdout, stderr):
        self.args, self._connection = args, connection
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.returncode = None
        self.pid = self._receive(b"p")

    def _receive(self, kind: bytes) -> int:
        content = self._connection.recv(MESSAGE.size, socket.MSG_WAITALL)
        if content[:1] != kind:
            raise RuntimeError("the fork server has ended, or could not start the program")
        return MESSAGE.unpack(content)[1]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._receive(b"s")
            self._connection.close()  # until then its number is given to no other process
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout: float | None = None) -> tuple:
        """(stdout, stderr): all that comes until both are closed by all processes that have them.

        Raises:
            TimeoutExpired: what was read is lost, and the program still runs.
        """
        end = None if timeout is None else time.monotonic() + timeout
        found = {}

        def read(name: str) -> None:
            found[name] = getattr(self, name).read()

        def write() -> None:
            with suppress(BrokenPipeError), self.stdin:
                if input:
                    self.stdin.write(input)

        names = [name for name in ("stdout", "stderr") if getattr(self, name)]
        threads = [threading.Thread(target=read, args=[name], daemon=True) for name in names]
        if self.stdin:
            threads.append(threading.Thread(target=write, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(end and max(end - time.monotonic(), 0))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(end and max(end - time.monotonic(), 0))
        for name in names:
            getattr(self, name).close()
        return found.get("stdout"), found.get("stderr")


# The side of the server


def import_libraries() -> None:
    """asteroid may need the guard of the project, and each program has to install its own."""
    finders = list(sys.meta_path)
    runpy.run_path(str(ROOT / "local" / "tools" / "asteroid_guard.py"))["install"]()
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.meta_path[:] = finders
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a process with threads cannot be forked safely"


def serve(control: socket.socket) -> tuple[socket.socket, list[int]]:
    """Forks for each program, and returns in the forked process: (connection, stdin to stderr)."""
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and with it the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the watching processes leave no zombies
    while True:
        message, fds, *_ = socket.recv_fds(control, 1, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            connection = socket.socket(fileno=fds[0])
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if program := os.fork():
                watch(program, connection, fds[1:])
            return connection, fds[1:]
        for fd in fds:
            os.close(fd)


def watch(program: int, connection: socket.socket, streams: list[int]) -> None:
    """Tells the tests how a program ended. Its number stays taken until they know."""
    for fd in streams:
        os.close(fd)
    end = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
    status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    with suppress(BrokenPipeError):
        connection.sendall(MESSAGE.pack(b"s", status))
        while connection.recv(4096):
            pass
    os._exit(0)


def become(connection: socket.socket, streams: list[int]) -> list[str]:
    """Makes this process what a new Python would be at its start; returns its arguments."""
    with connection, connection.makefile() as file:
        request = json.loads(file.readline())
        if request["start_new_session"]:
            os.setsid()
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
            os.close(fd)
        open_standard_streams()
        for signum in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        np.random.seed()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        connection.sendall(MESSAGE.pack(b"p", os.getpid()))
    return request["args"]


def open_standard_streams() -> None:
    """Opens them again: Python notes at its start whether a stream is a terminal or a file."""
    unbuffered = sys.stdout.write_through
    size = 0 if unbuffered else -1
    stdout, stderr = (open(number, "wb", size, closefd=False) for number in (1, 2))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = TextIOWrapper(stdout, write_through=unbuffered)
    sys.stderr = sys.__stderr__ = TextIOWrapper(
        stderr, errors="backslashreplace", line_buffering=True, write_through=unbuffered
    )


def run(args: list[str]) -> None:
    """Runs what `python *args` runs. What it raises ends this process as it ends Python."""
    kind, *rest = args
    main = sys.modules["__main__"] = sys.modules["__mp_main__"] = ModuleType("__main__")
    if kind == "-m":
        sys.path[0], sys.argv[:] = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv[:] = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        path = main.__file__ = os.path.abspath(kind)
        sys.path[0], sys.argv[:] = os.path.dirname(path), args
        exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


class QuickExit:
    """Ends the process when all exit handlers have run, without taking the libraries down, which
    takes longer than most tests.
    """

    def __init__(self):
        atexit.register(self._exit)  # before all others, and so it runs after them
        self.status = None

    def _exit(self) -> None:
        with suppress(OSError, ValueError):  # Python itself then says what could not be written
            sys.stdout.flush(), sys.stderr.flush()
            if self.status is not None:
                os._exit(self.status)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            self.status = 0
        elif isinstance(error, SystemExit):
            code = 0 if error.code is None else error.code
            self.status = code & 0xFF if isinstance(code, int) else 1
        elif not isinstance(error, KeyboardInterrupt):  # which Python makes its signal again
            self.status = 1


if __name__ == "__main__":
    quick_exit = QuickExit()
    import_libraries()
    import numpy as np
    import torch

    arguments = become(*serve(socket.socket(fileno=int(sys.argv[1]))))
    with quick_exit:
        run(arguments)
