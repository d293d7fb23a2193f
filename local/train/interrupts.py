"""Ctrl-C and what schedulers send: a run that hears it saves where it is, and ends."""

import os
import signal
import sys
import time
from contextlib import suppress

import pytorch_lightning as pl

# A closed terminal sends SIGHUP; SLURM sends SIGTERM, or SIGUSR1 where one asks for it in time.
HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME = 1.0  # seconds in which a signal that comes again, by way of torchrun, is the same one
HINT = b"\nending after this step; once more ends at once\n"


class Interrupted(Exception):
    """Raised where a run ends because of a signal."""


def ignore_signals(worker: int) -> None:
    """For a process of a loader, which is needed to finish the step: the run alone heeds them."""
    for signum in HEEDED:
        signal.signal(signum, signal.SIG_IGN)


class Interrupts(pl.Callback):
    """Notes the first signal, in `signum`: training ends before the next optimizer step (by
    `LastCheckpoints`), validation before the next track. A second one ends the run at once.

    From then on stdout leads nowhere, for the terminal may be closed, and Ctrl-C ends a tee, too:
    what cannot be shown must not end the run before it has saved.
    """

    signum = 0
    _stdout = None  # where it led

    def on_train_start(self, trainer, pl_module):
        self._hint = HINT if trainer.is_global_zero else b""
        for signum in HEEDED:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                signal.signal(signum, self._note)

    def on_validation_batch_start(self, trainer, *args):
        if self.signum and trainer.is_global_zero:  # which ends the others, and says how to go on
            raise Interrupted

    def _note(self, signum, frame):
        if not self.signum:
            self.signum, self._noted = signum, time.monotonic()
            with suppress(OSError):
                os.write(2, self._hint)  # print() may be at work in what was interrupted
            with suppress(OSError):  # there is none
                self._stdout = os.dup(1)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.close(nowhere)
        elif time.monotonic() - self._noted > SAME:
            signal.signal(signum, signal.SIG_IGN)
            raise KeyboardInterrupt

    def restore_stdout(self):
        """For what is to be said of a run that came to its end."""
        if self._stdout is not None:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os.dup2(self._stdout, 1)
            os.close(self._stdout)
            self._stdout = None
