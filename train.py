"""Train a stereo ConvTasNet on MUSDB18: python train.py --exp_dir EXP --root MUSDB18 ..."""

import logging
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import EarlyStopping, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from local.checkpoint import atomic_path
from local.config import (
    INTERRUPTED,
    UserError,
    clear_errors,
    find_faults,
    make_model,
    parse_conf,
    plural,
    raise_together,
)
from local.musdb18_dataset import (
    EpochSampler,
    RankSampler,
    SegmentDataset,
    TrackDataset,
    find_tracks,
    split_validation,
)
from local.system import BestCheckpoints, MusicSystem


def main(argv: list[str] | None = None) -> None:
    with clear_errors("train.py"):
        train(parse_conf(argv))


def train(conf: dict) -> None:
    """Trains as configured; everything it writes goes to exp_dir.

    Raises:
        UserError, DatasetError: a fault of the configuration, the data or exp_dir. All but those
            that only reading the audio can show come before anything is written.
    """
    exp_dir = Path(conf["main_args"]["exp_dir"])
    faults = find_faults(conf)
    if rank_zero_only.rank == 0 and is_used(exp_dir):
        faults.append(
            f"--exp_dir: {exp_dir} holds a run already; name another --exp_dir, or delete it"
        )
    raise_together(faults)
    pl.seed_everything(conf["training"]["seed"], verbose=False)
    train_set, valid_set = make_datasets(conf)
    trainer = make_trainer(conf, len(train_set), len(valid_set))
    model = make_model(conf)
    if trainer.is_global_zero:
        start_experiment(conf)
        print(describe_run(conf, model, train_set, valid_set, trainer), flush=True)
    system = make_system(conf, model, train_set, valid_set)
    try:
        trainer.fit(system)
    except SystemExit:  # how Lightning ends after Ctrl-C
        if trainer.is_global_zero:
            epoch = trainer.current_epoch
            print(f"\ninterrupted in epoch {epoch}; {describe_best(trainer)}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    if trainer.is_global_zero:
        print(f"{describe_stop(trainer)}; {describe_best(trainer)}")


def make_datasets(conf: dict) -> tuple[SegmentDataset, TrackDataset]:
    """Training segments and validation tracks, after a look at the header of every file."""
    data = conf["data"]
    tracks = find_tracks(Path(data["root"]), "train", data["sample_rate"], data["suffix"])
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
    callbacks = [BestCheckpoints(exp_dir), TQDMProgressBar()]
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
            logger=[
                TensorBoardLogger(exp_dir, name="tensorboard", version=""),
                CSVLogger(exp_dir, name="logs", version=""),
            ],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the samplers share the items out themselves
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        flags = ", ".join(f"--{k} {training[k]}" for k in ("devices", "accelerator", "num_nodes"))
        raise UserError(f"{flags}: {' '.join(str(error).split())}") from None
    ranks, faults = trainer.world_size, []
    batches = items // ranks // training["batch_size"]
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


def make_system(conf: dict, model, train_set: SegmentDataset, valid_set: TrackDataset):
    """The System: model, L1 loss, Adam, its scheduler, and the loaders."""
    training = conf["training"]
    workers = dict(
        num_workers=training["num_workers"],
        persistent_workers=training["num_workers"] > 0,
        pin_memory=torch.cuda.is_available(),
    )
    train_loader = DataLoader(
        train_set,
        batch_size=training["batch_size"],
        sampler=EpochSampler(len(train_set), training["seed"]),
        drop_last=True,
        **workers,
    )
    valid_loader = DataLoader(
        valid_set, batch_size=1, sampler=RankSampler(len(valid_set)), **workers
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=conf["optim"]["lr"])
    scheduler = None
    if training["half_lr"]:
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    return MusicSystem(
        model, optimizer, torch.nn.L1Loss(), train_loader, valid_loader, scheduler, conf
    )


def is_used(exp_dir: Path) -> bool:
    """Whether a run got far enough to leave a model there."""
    return (exp_dir / "best_model.pth").exists() or any(exp_dir.glob("checkpoints/*.ckpt"))


def start_experiment(conf: dict) -> None:
    """Makes exp_dir and its conf.yml, which holds all that is needed to rebuild the run.

    Raises:
        UserError: exp_dir cannot be written.
    """
    exp_dir = Path(conf["main_args"]["exp_dir"])
    for key in ("root", "valid_tracks"):  # the run can be rebuilt from any folder
        if conf["data"][key]:
            conf["data"][key] = str(Path(conf["data"][key]).absolute())
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(exp_dir / "conf.yml") as temporary:
            text = yaml.safe_dump(conf, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--exp_dir: {exp_dir} cannot be written: {error.strerror}") from None


def describe_run(conf: dict, model, train_set, valid_set, trainer: pl.Trainer) -> str:
    """What will be trained on what, for the first screen."""
    training, data, network = conf["training"], conf["data"], conf["convtasnet"]
    batches = len(train_set) // trainer.world_size // training["batch_size"]
    direction = "causal" if network["causal"] else "non-causal"
    halved = "halved after 5 epochs without a better val_loss" if training["half_lr"] else "fixed"
    early = ", or 20 without a better val_loss" if training["early_stop"] else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        "model": f"ConvTasNetStereo, {direction}, {network['norm_type']},"
        f" {parameters:,} parameters, {data['sample_rate']} Hz",
        "training": f"{_tracks(train_set)}, in random segments of {data['segment']} s",
        "validation": f"{_tracks(valid_set)}, whole",
        "data": data["root"],
        "epoch": f"{len(train_set)} items = {plural(batches, 'batch', 'batches')} of"
        f" {training['batch_size']} per device,"
        f" {plural(training['aggregate'], 'batch', 'batches')} to an optimizer step",
        "end": f"after {plural(training['epochs'], 'epoch')}{early}",
        "optimizer": f"Adam, lr {conf['optim']['lr']}, {halved}; seed {training['seed']}",
        "devices": f"{_devices(trainer)}, precision {training['precision']}",
        "output": conf["main_args"]["exp_dir"],
    }
    return "\n".join(f"{name:<11}{text}" for name, text in rows.items())


def _tracks(dataset: SegmentDataset | TrackDataset) -> str:
    minutes = sum(track.seconds for track in dataset.tracks) / 60
    duration = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    return f"{plural(len(dataset.tracks), 'track')} ({duration})"


def _devices(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU ({torch.get_num_threads()} threads)"
    else:
        name = device.type
    return f"{trainer.world_size} x {name}"


def describe_stop(trainer: pl.Trainer) -> str:
    """Why training ended."""
    stopper = trainer.early_stopping_callback
    if stopper is not None and stopper.stopped_epoch:
        return f"stopped in epoch {stopper.stopped_epoch}: {stopper.stopping_reason_message}"
    epochs, steps = plural(trainer.current_epoch, "epoch"), plural(trainer.global_step, "step")
    return f"trained for {epochs}, {steps}"


def describe_best(trainer: pl.Trainer) -> str:
    """Where the best model is."""
    best = trainer.checkpoint_callback
    if best.best_model_score is None:
        return "there is no best_model.pth yet: no epoch came to its validation"
    return f"best val_loss {best.best_model_score:.6f}, in {best.exp_dir / 'best_model.pth'}"


def quieten_lightning() -> None:
    """Keeps Lightning's advertisements, advice and own deprecations off the screen."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    quieten_lightning()
    main()
