"""How a run ends that does not finish: one line for what stopped it, and the exit status."""

import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl

from local.musdb18_dataset import STEMS
from local.system import MusicSystem
from local.tools.command_line import UserError, brief
from local.tools.files import is_failed_access
from local.tools.memory import is_out_of_memory
from local.tools.progress import keep
from local.tools.slurm import requeue_job
from local.train.display import describe_early_end
from local.train.interrupts import Interrupted, Interrupts
from local.train.loaders import LARGER_SHARED_MEMORY, SHARED_MEMORY


def fit(trainer: pl.Trainer, system: MusicSystem, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint on if there is one.

    Raises:
        UserError: memory ran out, or another rank or a worker of a loader ended.
        SystemExit: a signal came, or a file could not be written.
    """
    (interrupts,) = (found for found in trainer.callbacks if isinstance(found, Interrupts))
    try:
        trainer.fit(system, ckpt_path=checkpoint, weights_only=True)
    except BaseException as error:
        if _is_interrupt(error) or (is_lost_connection(error) and interrupts.signum):
            if trainer.is_global_zero:
                _print_error(f"\ninterrupted {describe_early_end(trainer)}")
                if requeued := requeue_job(interrupts.signum):
                    _print_error(requeued)
            raise SystemExit(128 + (interrupts.signum or signal.SIGINT)) from None
        if fault := describe_failure(error, system):
            raise UserError(fault) from None
        if _is_failed_write(error, system):
            exp_dir = system.config["main_args"]["exp_dir"]
            _print_error(
                f"\ntrain.py: error: {exp_dir} cannot be written (is the disk full?):"
                f" {brief(error)}; ended {describe_early_end(trainer)}"
            )
            raise SystemExit(1) from None
        raise
    else:
        interrupts.restore_stdout()  # a signal may have come too late to stop the run
    finally:
        for process in multiprocessing.active_children():  # workers, which ignore SIGTERM
            process.kill()


def describe_failure(error: BaseException, system: MusicSystem) -> str:
    """What ended a run, in a line; empty where the traceback should show it."""
    if is_out_of_memory(error):
        return advise_on_memory(system)
    if is_lost_connection(error):
        return "another process of this run ended; its error says why"
    if is_out_of_shared_memory(error):
        return (
            f"--num_workers: {SHARED_MEMORY}, through which workers send batches, is full;"
            f" {LARGER_SHARED_MEMORY}"
        )
    return describe_lost_worker(error, system)


def _is_interrupt(error: BaseException) -> bool:
    """Lightning ends with SystemExit after Ctrl-C; torch.save has an error of its own for it."""
    is_own = isinstance(error, (Interrupted, SystemExit))
    return is_own or isinstance(error.__context__, KeyboardInterrupt)


def _is_failed_write(error: BaseException, system: MusicSystem) -> bool:
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):  # of stdout
        return False
    return is_failed_access(error, Path(system.config["main_args"]["exp_dir"]))


def _print_error(text: str) -> None:
    keep(text)
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # else Python would complain at its end that it cannot flush the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def is_out_of_shared_memory(error: BaseException) -> bool:
    """Whether a worker could not write a batch to shared memory, by the messages of torch."""
    pattern = r"killed by signal: Bus error|unable to [\w ]+(\(shm\))?[\w ]*</?torch_"
    return isinstance(error, RuntimeError) and bool(re.search(pattern, str(error)))


def is_lost_connection(error: BaseException) -> bool:
    """Whether another rank has ended, by the messages of gloo and NCCL."""
    pattern = (
        "[Cc]onnection (closed|reset|was likely closed)|[Bb]roken pipe"
        "|remote process exited|communicator was aborted"
    )
    return isinstance(error, RuntimeError) and bool(re.search(pattern, str(error)))


def describe_lost_worker(error: BaseException, system: MusicSystem) -> str:
    """Which file a worker was reading when it ended; empty where none did, by torch's message."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
    if not found:
        return ""
    dataset = system.train_loader.dataset
    for pid in map(int, found[1].split(",")):
        if place := dataset.reading.find(pid):
            track, stem = dataset.tracks[place[0]], STEMS[place[1]]
            files = " and ".join(map(str, track.paths(stem)))
            return (
                f"a worker of a loader ended while it read {files}; is the file"
                " damaged, or was there no memory left? Fewer --num_workers need less"
            )
    return f"a worker of a loader ended: {brief(error)}"


def advise_on_memory(system: MusicSystem) -> str:
    """The flags with which a run that was out of memory may fit."""
    if not system.training:
        return "out of memory in validation; omit the longest tracks, with --valid_tracks"
    training, segment = system.config["training"], system.config["data"]["segment"]
    batch, aggregate = training["batch_size"], training["aggregate"]
    flags = ["--memory most", "--precision bf16-mixed", f"--segment below {segment}"]
    if batch > 1:
        less = batch // 2 if batch % 2 == 0 else 1
        more = batch * aggregate // less  # the same number of items in an optimizer step
        flags.append(f"--batch_size {less} --aggregate {more} (now {batch} and {aggregate})")
    return (
        f"out of memory in training; these need less: {', '.join(flags)}; a run that has begun"
        " resumes with them and --resume_with_changes"
    )
