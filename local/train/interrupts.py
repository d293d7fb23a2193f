"""Ctrl-C and the signals of schedulers: a run that gets one saves a checkpoint and ends."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytorch_lightning as pl

from local.tools.progress import keep

# A closed terminal sends SIGHUP; SLURM sends SIGTERM, or SIGUSR1 before the time limit on request.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME = 1.0  # seconds within which the same signal may come twice, by way of torchrun
HINT = b"\nending after this step; a second signal ends at once\n"


class Interrupted(Exception):
    """Raised where a run ends because of a signal."""


class Interrupts(pl.Callback):
    """Keeps the first signal in `signum`: training ends before the next optimizer step (see
    `LastCheckpoints`), validation before the next track. A second signal ends the run at once.

    After a signal stdout leads nowhere: the terminal may be closed, and Ctrl-C ends a tee, too. A
    line that cannot be shown must not end the run before it has saved.
    """

    signum = 0
    _stdout = None  # a copy of the descriptor

    def on_fit_start(self, trainer, pl_module):
        """The step that is finished after a signal needs its workers, so they ignore signals."""
        self._loaders = [pl_module.train_loader, pl_module.val_loader]
        self._init_functions = [loader.worker_init_fn for loader in self._loaders]
        for loader, init in zip(self._loaders, self._init_functions, strict=True):
            loader.worker_init_fn = partial(_init_worker, init)

    def on_train_start(self, trainer, pl_module):
        self._hint = HINT if trainer.is_global_zero else b""
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # set by nohup
                signal.signal(signum, self._handle)
        self.on_validation_start(trainer, pl_module)

    on_sanity_check_start = on_train_start  # a validation before training, which may take minutes

    def on_validation_start(self, trainer, pl_module):
        """Removes the handler of SIGCHLD that a loader with workers has set. It raises wherever the
        run is at that moment, and some places swallow the error; the loader that waits for a worker
        notices by itself that it has died.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def on_validation_batch_start(self, trainer, *args):
        if self.signum and trainer.is_global_zero:  # which ends the others
            raise Interrupted

    def teardown(self, trainer, pl_module, stage):
        for loader, init in zip(self._loaders, self._init_functions, strict=True):
            loader.worker_init_fn = init

    def _handle(self, signum, frame):
        if not self.signum:
            self.signum, self._received = signum, time.monotonic()
            with suppress(OSError):
                os.write(2, self._hint)  # the signal may have interrupted print()
            keep(f"{signal.Signals(signum).name}: {self._hint.decode().strip()}")
            with suppress(OSError):  # there may be no stdout
                self._stdout = os.dup(1)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.close(nowhere)
        elif time.monotonic() - self._received > SAME:
            signal.signal(signum, signal.SIG_IGN)
            raise KeyboardInterrupt

    def restore_stdout(self):
        """For a run that came to its end in spite of a signal."""
        if self._stdout is not None:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os.dup2(self._stdout, 1)
            os.close(self._stdout)
            self._stdout = None


def _init_worker(init: Callable | None, worker: int) -> None:
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if init is not None:
        init(worker)
