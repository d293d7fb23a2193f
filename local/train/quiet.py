"""Keeps off the screen what libraries say to their developers."""

import logging
import threading
import warnings

WARNINGS = (
    ".*does not have many workers",
    ".*isinstance.treespec, LeafSpec",
    # Of resumed runs.
    "Experiment logs directory",
    "Checkpoint directory",
    "You're resuming from a checkpoint",
)


def quieten_lightning() -> None:
    """Hides Lightning's advertisements, advice and deprecations, and the error of the thread that
    writes for TensorBoard, which its logger raises as well. Call it before Lightning is imported.
    """
    threading.excepthook = _show_thread_error
    handler = logging.StreamHandler()  # Lightning adds one of its own only where there is none
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _show_thread_error(args) -> None:
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
