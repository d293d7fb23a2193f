"""Everything private of torch, Lightning and asteroid that this project uses, each with its reason.

tests/test_private.py tests what each use relies on: after an upgrade, run it first.
"""

import signal
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in HOOKS)
PACKED = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
ROWS = 32  # for which oneDNN chooses the layout; for others it is almost as good


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after the forward or backward pass of a module.

    torch can register hooks and remove them, but has no public way to ask for them. The fast
    forward never calls the modules, so it would skip their hooks; recomputing would call them
    twice.
    """
    own = any(getattr(module, hooks) for hooks in HOOKS)
    return own or any(getattr(torch_module, hooks) for hooks in GLOBAL_HOOKS)


def list_packable() -> tuple[torch.dtype, ...]:
    """The dtypes of weights that `pack_linear` takes here."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not all(
        map(partial(hasattr, operators), PACKED)
    ):
        return ()
    return (torch.float32, *([torch.bfloat16] if operators._is_mkldnn_bf16_supported() else []))


def pack_linear(weight: Tensor, slope: float) -> Callable[[Tensor], Tensor]:
    """leaky_relu(rows (..., in) @ weight.T, slope) of rows of the weight's dtype, on the CPU.

    The weight (out, in) is copied into the layout of oneDNN, as torch.compile does with those of a
    frozen model: eager code has no public way to it.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    activation = ("none", [], "") if slope == 1 else ("leaky_relu", [slope], "")
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, None, *activation)


def end_with_sigterm_as_with_ctrl_c(trainer) -> None:
    """Lets a SIGTERM raise KeyboardInterrupt until `Interrupts` has set its own handlers, and keeps
    ranks from waiting for each other at every step.

    Lightning's handler only takes a note of the signal, and to share the note, it broadcasts a
    tensor before every batch. There is no public way to omit that.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    trainer._signal_connector._sigterm_notifier_fn = signal.default_int_handler


def kill_launched_processes(trainer) -> None:
    """Kills the ranks that Lightning has started from this process.

    The launcher waits for them when this process fails, and its watch over them would kill this
    process as well. There is no public way to end them.
    """
    processes = getattr(trainer.strategy.launcher, "procs", [])
    for process in processes:
        process.kill()
    processes.clear()


def draw_bar_if(bar, is_due) -> None:
    """Lets a TQDMProgressBar be drawn when `is_due(current, total)` says so.

    Lightning draws every so many batches. At a fixed number of batches a bar is either drawn too
    often for a GPU, since drawing reads metrics from it, or too seldom for a CPU.
    """
    bar._should_update = is_due


def move_average(averaging, device) -> None:
    """Moves the averaged model of a WeightAveraging to the device of a run.

    Lightning makes it before the model is moved, so it would stay on the CPU, and every step would
    copy all weights there. Its argument `device` would do, if the device were known before.
    """
    averaging._average_model.module.to(device)


def rewind_loops(checkpoint: dict, batch_idx: int) -> None:
    """Changes a checkpoint that was saved in on_train_batch_start, so that it is from before the
    batch was fetched, and before the epoch began where this is its first batch.

    Lightning resumes with the batch after the one that was fetched last. It offers no checkpoint
    from before a batch, nor a way to change the progress of its loops.
    """
    loops = checkpoint["loops"]["fit_loop"]
    if batch_idx == 0:
        for progress in loops["epoch_progress"].values():
            progress["ready"] = progress["started"] = progress["processed"]
        return
    batches = loops["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    for kind in ("total", "current"):
        batches[kind]["ready"] = batches[kind]["started"]


def set_finished_batches(checkpoint: dict, batches: int) -> None:
    """Sets how many batches of its epoch a checkpoint has behind it.

    Lightning counts batches, whose size may have changed.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], batches)
