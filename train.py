"""Train a stereo ConvTasNet on MUSDB18: python train.py --exp_dir EXP --root MUSDB18 ..."""

import atexit
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from local.config import find_faults, parse_conf
from local.models import count_parameters, make_model
from local.musdb18_dataset import SegmentDataset, TrackDataset, keep_batch
from local.musdb18_tracks import DatasetError, Track, find_tracks, split_validation
from local.system import MusicSystem
from local.tools.choices import SUFFIXES
from local.tools.command_line import UserError, brief, clear_errors, plural, raise_together
from local.tools.files import atomic_path, is_failed_access, locked
from local.train.checkpoints import AtomicCheckpointIO, BestCheckpoints, LastCheckpoints
from local.train.display import (
    Forecast,
    ProgressBar,
    describe_best,
    describe_end,
    describe_finished,
    describe_point,
    describe_run,
    describe_stop,
)
from local.train.failures import (
    advise_on_memory,
    describe_lost_worker,
    is_lost_connection,
    is_out_of_memory,
)
from local.train.interrupts import Interrupted, Interrupts, ignore_signals
from local.train.loaders import EpochSampler, RankSampler, count_batches
from local.train.loggers import make_loggers
from local.train.preflight import check_ends, find_place_faults
from local.train.resume import check_point, is_finished, load_last, load_point, record_changes

MULTI_NODE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")  # how machines find one another


def main(argv: list[str] | None = None) -> None:
    with clear_errors("train.py"):
        train(parse_conf(argv))


def train(conf: dict) -> None:
    """Trains as configured; everything it writes goes to exp_dir. With --check, all but that.

    Raises:
        UserError, DatasetError: a fault of the configuration, the data or exp_dir. All but those
            that only reading all of the audio can show come before anything is written.
    """
    options = take_options(conf)
    exp_dir = Path(conf["main_args"]["exp_dir"])
    train_set, valid_set = check(conf, options)
    pl.seed_everything(conf["training"]["seed"], verbose=False)
    trainer = make_trainer(conf, len(train_set), len(valid_set))
    with ExitStack() as held:
        writes = trainer.is_global_zero and not options["check"]
        if writes:
            held.enter_context(reserved(exp_dir))
        path, point = find_point(exp_dir, options["resume"], set_aside=writes)
        if point:
            accept_changes = options["resume_with_changes"]
            changes = check_point(conf, point, trainer, train_set, valid_set, accept_changes)
            if is_finished(point, conf):
                if trainer.is_global_zero:
                    print(describe_finished(path, point, changes))
                return
        system = make_system(conf, make_model(conf), train_set, valid_set)
        try:
            description = describe_run(system, trainer)
        except ValueError as error:
            raise UserError(f"--fast {conf['training']['fast']}: {error}") from None
        if point:
            description += f"\n{describe_point(path, point, conf, trainer)}"
        if options["check"]:
            print(f"{description}\nnothing was found that would stop this run; nothing was written")
            return
        if writes:
            if point and changes:
                record_changes(exp_dir, changes, point)
            write_conf(conf)
            print(description, flush=True)
        trainer.loggers = make_loggers(exp_dir, point)
        fit(trainer, system, path)
        if trainer.is_global_zero:
            print(f"{describe_stop(trainer)}; {describe_best(trainer)}")


def take_options(conf: dict) -> dict:
    """The flags that say how to run, and are no part of the configuration."""
    defaults = {"check": False, "resume": "auto", "resume_with_changes": False}
    return {name: conf["main_args"].pop(name, default) for name, default in defaults.items()}


def find_point(exp_dir: Path, resume: str, set_aside: bool) -> tuple[Path | None, dict | None]:
    """The checkpoint from which the run goes on, if there is one, and its content.

    Args:
        resume: the flag.
        set_aside: whether last checkpoints that are damaged are renamed.

    Raises:
        UserError: what --resume names is none, or those of a run are all damaged.
    """
    if resume == "never":
        return None, None
    folder = exp_dir / "checkpoints"
    if resume == "auto":
        path, point = load_last(folder, set_aside)
        if is_used(exp_dir) and not point:
            raise UserError(
                f"--exp_dir: {exp_dir} holds a run, and no last-*.ckpt from which it could go on;"
                " name another --exp_dir, or delete it"
            )
        # One that has learned nothing may start anew, with other settings, too.
        return (path, point) if is_used(exp_dir) else (None, None)
    path = Path(resume)
    if is_used(exp_dir) and path.parent.resolve() != folder.resolve():
        raise UserError(f"--resume {path}: {exp_dir} holds another run; name another --exp_dir")
    try:
        return path, load_point(path)
    except UserError as error:
        raise UserError(f"--resume {error}") from None


def check(conf: dict, options: dict) -> tuple[SegmentDataset, TrackDataset]:
    """Training segments and validation tracks, after a look at all that a run needs.

    Raises:
        UserError: lists the faults of the configuration, of the files under its root, and of the
            place for what the run writes.
    """
    exp_dir, data = Path(conf["main_args"]["exp_dir"]), conf["data"]
    faults, datasets = find_faults(conf), None
    is_valid, is_first = not faults, rank_zero_only.rank == 0
    resume = options["resume"]
    if is_first and resume == "never" and is_used(exp_dir):
        faults.append(
            f"--resume never: {exp_dir} holds a run already; name another --exp_dir, or delete it"
        )
    if resume not in ("auto", "never") and not Path(resume).is_file():
        faults.append(f"--resume must be auto, never or a last-*.ckpt; no such file: {resume}")
    if is_first and conf["main_args"]["exp_dir"]:
        faults += find_place_faults(exp_dir, count_parameters(conf) if is_valid else 0)
    if data["root"] and Path(data["root"]).is_dir() and data["suffix"] in SUFFIXES:
        try:
            tracks = find_tracks(Path(data["root"]), "train", data["sample_rate"], data["suffix"])
            if is_first:  # the others would read the same
                check_ends(Path(data["root"]), tracks)
            if is_valid:
                datasets = make_datasets(conf, tracks)
        except DatasetError as error:
            faults.append(str(error).replace("\n", "\n  ") if faults else str(error))
    raise_together(faults)
    return datasets


def fit(trainer: pl.Trainer, system: MusicSystem, point: Path | None) -> None:
    """Trains, from a checkpoint on if there is one, and says how it ended if not at the end.

    Raises:
        UserError: memory ran out, or another process of the run or a loader ended.
        SystemExit: interrupted, or something could not be written.
    """
    (interrupts,) = (found for found in trainer.callbacks if isinstance(found, Interrupts))
    try:
        trainer.fit(system, ckpt_path=point, weights_only=True)
    except BaseException as error:
        # How Lightning ends after Ctrl-C, and what torch.save makes of one that comes within it.
        is_stop = isinstance(error, (Interrupted, SystemExit))
        is_stop |= isinstance(error.__context__, KeyboardInterrupt)
        if is_stop or (is_lost_connection(error) and interrupts.signum):
            if trainer.is_global_zero:
                say(f"\ninterrupted {describe_end(trainer)}")
            raise SystemExit(128 + (interrupts.signum or signal.SIGINT)) from None
        if is_out_of_memory(error):
            raise UserError(advise_on_memory(system)) from None
        if is_lost_connection(error):
            raise UserError("another process of this run ended; its error says why") from None
        if fault := describe_lost_worker(error, system):
            raise UserError(fault) from None
        if isinstance(error, BrokenPipeError):  # of stdout
            raise
        exp_dir = Path(system.config["main_args"]["exp_dir"])
        if isinstance(error, OSError) and is_failed_access(error, exp_dir):
            say(
                f"\ntrain.py: error: {exp_dir} cannot be written (is the disk full?):"
                f" {brief(error)}; ended {describe_end(trainer)}"
            )
            raise SystemExit(1) from None
        raise
    else:
        interrupts.restore_stdout()  # a signal may have come too late to stop it
    finally:
        for process in multiprocessing.active_children():  # of loaders, which heed no SIGTERM
            process.kill()


def say(text: str) -> None:
    """On stderr, if anything is there."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # else Python would complain at its end that it cannot flush what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class EndOthers(pl.Callback):
    """Ends the processes that Lightning started beside this one as soon as this one fails."""

    def on_exception(self, trainer, pl_module, exception):
        processes = getattr(trainer.strategy.launcher, "procs", [])
        for process in processes:
            process.kill()
        processes.clear()  # or else Lightning's watch over them kills this process, too


def make_datasets(conf: dict, tracks: list[Track]) -> tuple[SegmentDataset, TrackDataset]:
    """Training segments and validation tracks.

    Raises:
        DatasetError: a track is shorter than a segment, or there is nothing to validate on.
    """
    data = conf["data"]
    names = Path(data["valid_tracks"]) if data["valid_tracks"] else None
    training, validation = split_validation(tracks, names)
    if data["max_valid_tracks"] > 0:
        validation = validation[: data["max_valid_tracks"]]
    train_set = SegmentDataset(
        training,
        int(data["segment"] * data["sample_rate"]),
        data["samples_per_track"],
        data["mix_background"],
        conf["training"]["seed"],
    )
    return train_set, TrackDataset(validation, data["mix_background"])


def make_trainer(conf: dict, items: int, valid_tracks: int) -> pl.Trainer:
    """Lightning's Trainer, set as in the published recipe.

    Args:
        items: to train on in an epoch, over all devices.
        valid_tracks: to validate on, over all devices.
    """
    training, exp_dir = conf["training"], Path(conf["main_args"]["exp_dir"])
    interrupts = Interrupts()
    callbacks = [EndOthers(), interrupts, BestCheckpoints(exp_dir), ProgressBar(), Forecast()]
    callbacks += [
        LastCheckpoints(exp_dir / "checkpoints", training["checkpoint_every"], interrupts)
    ]
    if training["early_stop"]:
        callbacks.append(EarlyStopping("val_loss", mode="min", patience=20))
    try:
        trainer = pl.Trainer(
            max_epochs=training["epochs"],
            accelerator=training["accelerator"],
            devices=training["devices"],
            num_nodes=training["num_nodes"],
            precision=training["precision"],
            accumulate_grad_batches=training["aggregate"],
            gradient_clip_val=5.0,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=False,  # until it is known where the run starts
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the samplers share the items out themselves
            enable_model_summary=False,
        )
        check_launcher(trainer)
    except (MisconfigurationException, TypeError, ValueError) as error:
        flags = ", ".join(f"--{k} {training[k]}" for k in ("devices", "accelerator", "num_nodes"))
        raise UserError(f"{flags}: {' '.join(str(error).split())}") from None
    set_up_ranks(trainer)
    ranks, faults = trainer.world_size, []
    batches = count_batches(conf, items, ranks)
    if batches == 0:
        faults.append(
            f"--batch_size {training['batch_size']} on {plural(ranks, 'device')} is more than the"
            f" {items} training items of an epoch; lower it or raise --samples_per_track"
        )
    if valid_tracks < ranks:
        faults.append(
            f"--devices: {ranks} devices have only {plural(valid_tracks, 'track')} to validate on;"
            f" use --devices {valid_tracks} or more validation tracks"
        )
    raise_together(faults)
    steps = max(batches // training["aggregate"], 1)
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps)
    return trainer


def check_launcher(trainer: pl.Trainer) -> None:
    """Looks, before anything waits for it, whether all processes of the run will be there.

    Raises:
        ValueError: no, or others than the flags ask for.
    """
    environment = trainer._accelerator_connector.cluster_environment
    missing = ", ".join(name for name in MULTI_NODE if name not in os.environ)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and missing:
        raise ValueError(
            "to train on several machines, start train.py on each with torchrun or srun, or with"
            f" {', '.join(MULTI_NODE)} in the environment; there is no {missing}"
        )
    if isinstance(trainer.strategy, DDPStrategy) or torch.distributed.is_torchelastic_launched():
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)


def set_up_ranks(trainer: pl.Trainer) -> None:
    """Makes processes share gradients at optimizer steps, and wait for each other nowhere else."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs.update(gradient_as_bucket_view=True)
        atexit.register(leave_ranks)
    # Lightning would ask all ranks at every step whether one has heard SIGTERM, and wait for the
    # answer. A rank that hears it here ends as with Ctrl-C, and so end the others.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    trainer._signal_connector._sigterm_notifier_fn = signal.default_int_handler


def leave_ranks() -> None:
    """Ends the threads of gloo, which Lightning leaves running: one that has yet to give back the
    tensors of a collective aborts its process if Python ends first.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_system(conf: dict, model, train_set: SegmentDataset, valid_set: TrackDataset):
    """The System: model, L1 loss, Adam, its scheduler, and the loaders."""
    training = conf["training"]
    workers = dict(
        num_workers=training["num_workers"],
        persistent_workers=training["num_workers"] > 0,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available() and training["accelerator"] != "cpu",
    )
    # A loader that waits for items sees itself that a process of its own is gone. torch's handler
    # of SIGCHLD says so wherever the run is just then, and some places there swallow the error.
    signal_handling._SIGCHLD_handler_set = True
    train_loader = DataLoader(
        train_set,
        batch_size=training["batch_size"],
        sampler=EpochSampler(len(train_set), training["seed"]),
        collate_fn=keep_batch,
        drop_last=True,
        **workers,
    )
    valid_loader = DataLoader(
        valid_set, batch_size=1, sampler=RankSampler(len(valid_set)), **workers
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=conf["optim"]["lr"], fused=True)
    scheduler = None
    if training["half_lr"]:
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    return MusicSystem(
        model, optimizer, torch.nn.L1Loss(), train_loader, valid_loader, scheduler, conf
    )


def is_used(exp_dir: Path) -> bool:
    """Whether a run got far enough to learn something there."""
    checkpoints = exp_dir.glob("checkpoints/*.ckpt")
    learned = (not path.name.endswith("-step=0.ckpt") for path in checkpoints)
    return (exp_dir / "best_model.pth").exists() or any(learned)


@contextmanager
def reserved(exp_dir: Path) -> Iterator[None]:
    """Makes a folder and holds it for this process; removes it if nothing came to be there.

    Raises:
        UserError: it cannot be written, or another process holds it.
    """
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--exp_dir: {exp_dir} cannot be written: {error.strerror}") from None
    with locked(exp_dir):
        try:
            yield
        finally:
            if [path.name for path in exp_dir.iterdir()] == [".lock"]:
                shutil.rmtree(exp_dir)


def write_conf(conf: dict) -> None:
    """Writes EXP/conf.yml, which holds all that is needed to rebuild the run.

    Raises:
        UserError: it cannot be written.
    """
    exp_dir = Path(conf["main_args"]["exp_dir"])
    for key in ("root", "valid_tracks"):  # the run can be rebuilt from any folder
        if conf["data"][key]:
            conf["data"][key] = str(Path(conf["data"][key]).absolute())
    try:
        with atomic_path(exp_dir / "conf.yml") as temporary:
            text = yaml.safe_dump(conf, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--exp_dir: {exp_dir} cannot be written: {error.strerror}") from None


def quieten_lightning() -> None:
    """Keeps Lightning's advertisements, advice and own deprecations off the screen, and what the
    thread that writes for TensorBoard says before its logger raises the same error.
    """
    threading.excepthook = show_thread_error
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        # Of runs that go on.
        "Experiment logs directory",
        "Checkpoint directory",
        "You're resuming from a checkpoint",
    ):
        warnings.filterwarnings("ignore", message=message)


def show_thread_error(args) -> None:
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


if __name__ == "__main__":
    quieten_lightning()
    main()
