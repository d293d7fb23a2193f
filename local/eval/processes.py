"""The processes that score: one BLAS thread each, deaf to Ctrl-C, and gone when this one ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

from local.tools.command_line import UserError
from local.tools.socket_folder import make_socket_folder

# What takes seconds to import. The fork server imports it once for all scoring processes. Modules
# of this project are not here: the server may run in a folder where it cannot find them.
IMPORTS = ["museval", "scipy.fft", "soundfile"]


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Block it in the processes started within, and
    SIGUSR1, which srun sends to all processes.

    Else the fork server would stop during its imports, and a scoring process during its start, each
    with a traceback.
    """
    received = []
    handler = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    # New processes inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def make_processes(count: int) -> ProcessPoolExecutor:
    """Make a pool of `count` processes.

    Raises:
        UserError: there is no place for what processes share.
    """
    make_socket_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    try:
        with delayed_interrupts():  # Python starts a process for its semaphores
            return ProcessPoolExecutor(count, context, initializer=_start_process)
    except OSError as error:  # of a semaphore
        raise UserError(
            f"/dev/shm, through which processes wait for one another, cannot be used:"
            f" {error.strerror}; make it writable"
        ) from None


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
