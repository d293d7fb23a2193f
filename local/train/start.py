"""What a new run starts from: the weights that --init names, in place of random ones."""

from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from local.checkpoint import find_weights, load_with_arguments
from local.keys import KEYS
from local.models import model_args, model_name, model_settings
from local.tools.command_line import UserError, plural, raise_together
from local.tools.files import make_absolute, sha256
from local.tools.progress import say
from local.train.resume import find_saved_conf

RECORDED = ("init", "init_partial", "init_sha256")  # keys of the section training


def find_base(conf: dict, options: dict) -> nn.Module | None:
    """The model of --init, None where there is none; the configuration gets that model's settings.

    A run that is resumed keeps what it was started with: `conf` gets that, and the result is None.

    Raises:
        UserError: it cannot be loaded, typed flags contradict it, or its weights have changed.
    """
    training, typed, source = conf["training"], options["typed"], conf["training"]["init"]
    if saved := find_saved_conf(conf, options):
        _refuse_other_base(conf, saved["training"])
        if source:
            training |= {key: saved["training"][key] for key in RECORDED}
            _take_settings(conf, model_settings(model_name(saved), model_args(saved)), typed)
        return None
    if not source:
        raise_together([f"--{key} needs --init, the weights" for key in RECORDED if training[key]])
        return None
    loaded = load_with_arguments(source, "--init")
    settings, file_hash = (
        model_settings(loaded.name, loaded.arguments),
        sha256(find_weights(source)),
    )
    if training["init_sha256"] not in ("", file_hash):
        raise UserError(
            f"--init: {source} has other weights than the run of this configuration (SHA-256"
            f" {file_hash}, and init_sha256 is {training['init_sha256']}); name the weights of that"
            " run, or type --init, which takes any"
        )
    if not training["init_partial"]:
        _refuse_contradictions(conf, settings, typed)
    _take_settings(conf, settings, typed)
    path = Path(source)
    training |= {"init": make_absolute(path) if path.exists() else source, "init_sha256": file_hash}
    return loaded.model


def _refuse_other_base(conf: dict, before: dict) -> None:
    """Raises a UserError if a run was not started from what --init names.

    Args:
        before: the section training of that run.
    """
    source, exp_dir = conf["training"]["init"], conf["main_args"]["exp_dir"]
    run = f"--init: {exp_dir} holds a run that was started from {before['init'] or 'none'}"
    if source and not before["init"]:
        raise UserError(f"{run}; omit --init to resume it, or name another --exp_dir")
    if before["init"] and not source:
        raise UserError(f"{run}; add --init {before['init']} to resume it")
    file = find_weights(source) if source else None
    if file and (found := sha256(file)) != before["init_sha256"]:
        raise UserError(
            f"{run} (SHA-256 {before['init_sha256']}), and {source} has other weights (SHA-256"
            f" {found}); type --init as before to resume it, or name another --exp_dir"
        )


def _refuse_contradictions(conf: dict, settings: dict, typed: tuple[str, ...]) -> None:
    faults = [
        f"--{key} {conf[section][key]}: its model has {value}; omit the flag, or add"
        " --init_partial yes"
        for section, keys in settings.items()
        for key, value in keys.items()
        if key in typed and conf[section][key] != value
    ]
    raise_together(faults, heading=f"--init {conf['training']['init']}")


def _take_settings(conf: dict, settings: dict, typed: tuple[str, ...]) -> None:
    """Sets what was not typed."""
    for section, keys in settings.items():
        given = conf.setdefault(section, {})
        if section not in KEYS:  # one that it lacks has the default of the model's constructor
            for key in given.keys() - keys.keys() - set(typed):
                del given[key]
        given.update({key: value for key, value in keys.items() if key not in typed})


def take_weights(model: nn.Module, base: nn.Module) -> None:
    """Copies all tensors of another model that fit, by name and shape.

    Raises:
        UserError: none does.
    """
    own, given = model.state_dict(), base.state_dict()
    fitting = {name: given[name] for name in own if _fits(name, own, given)}
    if not fitting:
        raise UserError("--init_partial: no tensor of --init fits the model; omit both flags")
    model.load_state_dict(own | fitting)


def describe_start(conf: dict, model: nn.Module, base: nn.Module | None) -> dict[str, str]:
    """The rows of the first screen on --init and --freeze.

    Args:
        base: as of `find_base`.
    """
    training, rows = conf["training"], {}
    if training["init"]:
        rows["init"] = f"{training['init']}, SHA-256 {training['init_sha256']}"
    if base is not None:
        own, given = model.state_dict(), base.state_dict()
        rows["new"] = _list_unfit(own, given)
        rows["left out"] = _list_unfit(given, own)
    if training["freeze"]:
        sizes = [
            parameter.numel() for parameter in model.parameters() if not parameter.requires_grad
        ]
        rows["frozen"] = f"{training['freeze']}: {sum(sizes):,} parameters"
    return {name: text for name, text in rows.items() if text}


def _fits(name: str, own: dict, given: dict) -> bool:
    return name in own and name in given and own[name].shape == given[name].shape


def _list_unfit(own: dict, given: dict) -> str:
    """Tensors that another model does not have in that shape, a line each; "" for none."""
    names = [name for name in own if not _fits(name, own, given)]
    lines = [plural(len(names), "tensor"), *(f"{name} {tuple(own[name].shape)}" for name in names)]
    return "\n           ".join(lines) if names else ""


class StartLoss(pl.Callback):
    """Measures the val_loss of the weights that a run starts from, in what Lightning calls its
    sanity check: before the first step, unseen by schedule, early stop and checkpoints.

    It is logged as val_loss_start with the first epoch, also where that was resumed.
    """

    _loss = None

    def state_dict(self) -> dict:
        return {"val_loss": self._loss}

    def load_state_dict(self, state_dict):
        self._loss = state_dict["val_loss"]

    def on_sanity_check_end(self, trainer, pl_module):
        self._loss = trainer.callback_metrics["val_loss"].item()
        if trainer.is_global_zero:
            say(f"{'val_loss':<11}{self._loss:.6f} with the weights of --init, before any step")

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            pl_module.log("val_loss_start", self._loss, sync_dist=True)
