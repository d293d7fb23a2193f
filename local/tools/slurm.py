"""SIGUSR1, which SLURM sends before the time limit on request: the job is started once more."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from local.tools.command_line import brief


@contextmanager
def requeueing() -> Iterator[None]:
    """On SIGUSR1, end by SystemExit and have SLURM start the job once more: see `requeue_job`."""
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except SystemExit as end:
        if end.code == 128 + signal.SIGUSR1 and os.environ.get("SLURM_PROCID", "0") == "0":
            print(requeue_job(signal.SIGUSR1) or "ended by SIGUSR1", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGUSR1, handler)


def requeue_job(signum: int) -> str:
    """Has SLURM start the job of this process once more, as Lightning does on SIGUSR1.

    Returns:
        what was done, in a line; empty for other signals, and where srun has not started this.
    """
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    if signum != signal.SIGUSR1 or not SLURMEnvironment.detect():
        return ""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        command = ["scontrol", "requeue", job]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or brief(error)).strip()
        return f"warning: SLURM has not requeued job {job}: {reason}; submit it again"
    return f"SLURM has requeued job {job}"
