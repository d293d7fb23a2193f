"""Train a stereo ConvTasNet on MUSDB18: python train.py --exp_dir EXP --root MUSDB18 ..."""

from pathlib import Path

from local.config import OPTIONS, parse_conf
from local.tools.command_line import clear_errors
from local.tools.progress import say, set_progress
from local.train.quiet import quieten_lightning

# Libraries that take seconds to import are imported where they are used: --help needs none.


def main(argv: list[str] | None = None) -> None:
    with clear_errors("train.py"):
        train(parse_conf(argv))


def train(conf: dict) -> None:
    """Trains as configured; writes everything to exp_dir. With --check, stops before that.

    Raises:
        UserError: lists the faults of the configuration, the data and exp_dir. Nothing is written
            then, except where only reading all of the audio can show a fault.
    """
    import pytorch_lightning as pl

    from local.models import make_model
    from local.tools.freeze import freeze
    from local.train.display import describe_end
    from local.train.failures import fit
    from local.train.first_screen import describe_run
    from local.train.loggers import make_loggers
    from local.train.preflight import check_run
    from local.train.resume import find_resumed
    from local.train.run_folder import reserved, write_settings
    from local.train.run_log import kept_log
    from local.train.start import take_weights

    exp_dir = Path(conf["main_args"]["exp_dir"])
    options = {name: conf["main_args"].pop(name, default) for name, default in OPTIONS.items()}
    set_progress(options["quiet"], options["progress"])
    (train_set, valid_set), base = check_run(conf, options, make_datasets)
    pl.seed_everything(conf["training"]["seed"], verbose=False)
    trainer = make_trainer(conf, len(train_set), len(valid_set))
    is_first = trainer.is_global_zero  # of the processes of a run, the one that writes and prints
    writes = is_first and not options["check"]
    with reserved(exp_dir, writes), kept_log(exp_dir, writes) as log:
        resumed = find_resumed(conf, options, trainer, train_set, valid_set)
        if resumed and (end := resumed.describe_end(conf)):
            if is_first:
                print(end)
            return
        model = make_model(conf)
        if base is not None:
            take_weights(model, base)
        freeze(model, conf["training"]["freeze"])
        system = make_system(conf, model, train_set, valid_set)
        description = describe_run(system, trainer, resumed, base)
        if options["check"]:
            print(f"{description}\nno fault was found; nothing was written")
            return
        if is_first:
            write_settings(conf, resumed)
            log.begin()
            say(description)
        trainer.loggers = make_loggers(conf, resumed)
        fit(trainer, system, resumed.path if resumed else None)
        if is_first:
            say(describe_end(trainer))


def make_datasets(conf: dict, tracks: list):
    """(training segments, validation tracks) of the tracks of the train split.

    Raises:
        DatasetError: a track is shorter than a segment, or there is nothing to validate on.
    """
    from local.musdb18_dataset import SegmentDataset, TrackDataset
    from local.musdb18_tracks import split_validation

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
        data["mix_tracks"],
        (data["gain_min"], data["gain_max"]),
        data["swap"],
    )
    return train_set, TrackDataset(validation, data["mix_background"])


def make_system(conf: dict, model, train_set, valid_set):
    """The System: model, optimizer, loss, loaders, and the schedule of the learning rate."""
    import torch
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    from local.losses import LOSSES
    from local.system import MusicSystem
    from local.train.loaders import make_loaders

    train_loader, valid_loader = make_loaders(conf, train_set, valid_set)
    training, optim = conf["training"], conf["optim"]
    make_optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim["optimizer"]]
    optimizer = make_optimizer(
        model.parameters(), lr=optim["lr"], weight_decay=optim["weight_decay"], fused=True
    )
    loss_func = LOSSES[training["loss"]]()
    scheduler = None
    if training["half_lr"]:
        # A loss in dB is below zero, where a share of it would count a worse one as better.
        mode = "abs" if getattr(loss_func, "is_in_decibels", False) else "rel"
        scheduler = ReduceLROnPlateau(
            optimizer, factor=0.5, patience=training["lr_patience"], threshold_mode=mode
        )
    return MusicSystem(model, optimizer, loss_func, train_loader, valid_loader, scheduler, conf)


def make_trainer(conf: dict, items: int, valid_tracks: int):
    """Lightning's Trainer, set as in the published recipe.

    Args:
        items: to train on in an epoch, over all devices.
        valid_tracks: to validate on, over all devices.

    Raises:
        UserError: there are no such devices, or too many for the items or tracks.
    """
    from pytorch_lightning.callbacks import EarlyStopping

    from local.train.callbacks import make_run_callbacks
    from local.train.checkpoints import AtomicCheckpointIO, BestCheckpoints
    from local.train.devices import make_trainer_on_devices

    training = conf["training"]
    best = BestCheckpoints(Path(conf["main_args"]["exp_dir"]), training["keep_best"])
    callbacks = [best, *make_run_callbacks(conf)]
    if training["early_stop"]:
        callbacks.append(EarlyStopping("val_loss", mode="min", patience=training["patience"]))
    return make_trainer_on_devices(
        conf,
        items,
        valid_tracks,
        max_epochs=training["epochs"],
        precision=training["precision"],
        accumulate_grad_batches=training["aggregate"],
        gradient_clip_val=training["clip_norm"],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=-1 if training["init"] else 0,  # see StartLoss
        use_distributed_sampler=False,  # the samplers share the items out
        enable_model_summary=False,
    )


if __name__ == "__main__":
    quieten_lightning()
    main()
