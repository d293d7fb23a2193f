"""Keeps off the screen what libraries say to their developers."""

import logging
import threading
import warnings

WARNINGS = (
    ".*does not have many workers",
    "This DataLoader will create",  # more workers than there are cores
    ".*isinstance.treespec, LeafSpec",
    r"Found \d+ module\(s\) in eval mode",  # frozen BN
    # Of resumed runs.
    "Experiment logs directory",
    "Checkpoint directory",
    "You're resuming from a checkpoint",
    "Be aware that when using `ckpt_path`, callbacks used to create",
    "The checkpoint was not created with WeightAveraging",
)


def quieten_lightning() -> None:
    """Hides Lightning's advertisements, advice and deprecations, and the error of the thread that
    writes for TensorBoard, which its logger raises as well.
    """
    threading.excepthook = _show_thread_error
    # When it is imported, Lightning asks for INFO, and adds a handler only where there is none.
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    for name in ("pytorch_lightning", "lightning_fabric"):  # where it has been imported
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _show_thread_error(args) -> None:
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
