"""The devices and ranks of a run."""

import atexit
import os

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from local.tools.command_line import UserError, plural, raise_together
from local.tools.private import end_with_sigterm_as_with_ctrl_c, kill_launched_processes
from local.train.loaders import count_batches, find_shared_memory_faults
from local.train.ranks import end_process_group

MULTI_NODE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")  # by which machines find one another


def make_trainer_on_devices(conf: dict, items: int, valid_tracks: int, **settings) -> pl.Trainer:
    """A Trainer with the devices of a configuration, whose ranks wait for each other at optimizer
    steps alone.

    Args:
        items: to train on in an epoch, over all devices.
        valid_tracks: to validate on, over all devices.
        settings: of the Trainer.

    Raises:
        UserError: there are no such devices, the launcher has started other processes than the
            flags ask for, there are not enough items or tracks for all devices, or too little
            shared memory for their workers.
    """
    training = conf["training"]
    names = ("devices", "accelerator", "num_nodes")
    settings |= {name: training[name] for name in names} | {"logger": False}
    # Lightning's own choice may be MPS, which has no float64, or a device that was never tried.
    uses_gpu = training["accelerator"] != "cpu" and torch.cuda.is_available()
    settings["accelerator"] = "cuda" if uses_gpu else "cpu"
    # Under SLURM Lightning would resume from any hpc_ckpt_*.ckpt in the current folder.
    settings["default_root_dir"] = conf["main_args"]["exp_dir"]
    try:
        if SLURMEnvironment.detect() and not torch.distributed.is_torchelastic_launched():
            # Lightning would save a checkpoint of its own and requeue: see `requeue_job`.
            settings["plugins"] = [
                *settings.get("plugins", ()),
                SLURMEnvironment(auto_requeue=False),
            ]
        trainer = pl.Trainer(**settings)
        if isinstance(trainer.strategy, DDPStrategy):  # which Lightning chooses for several
            trainer = pl.Trainer(**settings, strategy=DDPStrategy(gradient_as_bucket_view=True))
            atexit.register(end_process_group)
        _check_launcher(trainer)
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        flags = ", ".join(f"--{name} {training[name]}" for name in names)
        raise UserError(f"{flags}: {' '.join(str(error).split())}") from None
    end_with_sigterm_as_with_ctrl_c(trainer)
    faults = _find_share_faults(conf, items, valid_tracks, trainer.world_size)
    if trainer.local_rank == 0:  # of the processes on a machine, which share its memory
        faults += find_shared_memory_faults(conf, trainer.num_devices)
    raise_together(faults)
    batches = count_batches(conf, items, trainer.world_size)
    steps = max(batches // training["aggregate"], 1)
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps)
    return trainer


def _check_launcher(trainer: pl.Trainer) -> None:
    """Raises a ValueError unless all processes of the run will be there, before anything waits."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if torch.distributed.is_torchelastic_launched():
        environment = TorchElasticEnvironment()
    missing = ", ".join(name for name in MULTI_NODE if name not in os.environ)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and missing:
        raise ValueError(
            "to train on several machines, start train.py on each with torchrun or srun, or with"
            f" {', '.join(MULTI_NODE)} in the environment; there is no {missing}"
        )
    if environment is not None:
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)


def _find_share_faults(conf: dict, items: int, valid_tracks: int, ranks: int) -> list[str]:
    faults = []
    if count_batches(conf, items, ranks) == 0:
        faults.append(
            f"--batch_size {conf['training']['batch_size']} on {plural(ranks, 'device')} is more"
            f" than the {items} training items of an epoch; lower --batch_size or --devices, or"
            " raise --samples_per_track"
        )
    if valid_tracks < ranks:
        faults.append(
            f"--devices: {ranks} devices have only {plural(valid_tracks, 'track')} to validate on;"
            f" use at most {valid_tracks}, or more validation tracks"
        )
    return faults


class EndOtherRanks(pl.Callback):
    """Ends the processes that Lightning has started as soon as this one fails."""

    def on_exception(self, trainer, pl_module, exception):
        kill_launched_processes(trainer)
