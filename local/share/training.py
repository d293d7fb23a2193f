"""How a model was trained, as a section of its card."""

from local.config import add_defaults
from local.share.facts import Facts
from local.tools.command_line import plural
from local.tools.markdown import escape, table

LOSSES = {"l1": "L1", "mse": "mean squared error", "sdr": "-SDR", "si_sdr": "-SI-SDR"}
PACKAGES = {"recipe": "this recipe", "torch": "PyTorch", "pytorch-lightning": "PyTorch Lightning"}
UNRECORDED = (
    "The file that these weights are from does not record how they were trained. Its SHA-256 is"
    " `{sha256}`."
)


def describe_training(facts: Facts) -> str:
    """Return the section of the card."""
    infos = facts.infos
    if "configuration" not in infos:
        return UNRECORDED.format(sha256=facts.sha256)
    conf = add_defaults(infos["configuration"])
    rows = {
        "model": ", ".join(f"{key} {value}" for key, value in facts.arguments.items()),
        "data": escape(facts.dataset),
        "training tracks": _describe_tracks(infos, "training_tracks"),
        "validation tracks": _describe_tracks(infos, "validation_tracks"),
        "items": _describe_items(conf),
        "loss": LOSSES.get(conf["training"]["loss"], conf["training"]["loss"]),
        "optimizer": _describe_optimizer(conf),
        "batches": _describe_batches(conf["training"]),
        "length": _describe_length(infos, conf["training"]),
        "seed": str(conf["training"]["seed"]),
        "precision": conf["training"]["precision"],
        "started from": _describe_base(facts, conf["training"]),
        "versions": _describe_versions(infos.get("software_versions", {})),
        "commit of the recipe": escape(str(infos.get("commit", "unknown"))),
        "SHA-256 of best\\_model.pth": f"`{facts.sha256}`",
    }
    return table([["setting", "value"], *map(list, rows.items())], left=2)


def _describe_tracks(infos: dict, kind: str) -> str:
    """Their number and duration; files of earlier versions lack the second, or both."""
    if kind not in infos:
        return "unknown"
    text = plural(len(infos[kind]), "track")
    hours = infos.get("hours", {}).get(kind)
    if hours is None:
        return text
    return f"{text}, {hours:.1f} h" if hours >= 1 else f"{text}, {60 * hours:.1f} min"


def _describe_items(conf: dict) -> str:
    data = conf["data"]
    start = f"{data['samples_per_track']} from each track in every epoch, {data['segment']} s long"
    how = (
        "each source from a track and a place of its own (random mixes)"
        if data["mix_tracks"]
        else "all sources from one place of one track"
    )
    gains = f"gains of {data['gain_min']} to {data['gain_max']}"
    return f"{start}; {how}, with {gains}, channels swapped with a probability of {data['swap']}"


def _describe_optimizer(conf: dict) -> str:
    optim, training = conf["optim"], conf["training"]
    name = {"adam": "Adam", "adamw": "AdamW"}.get(optim["optimizer"], optim["optimizer"])
    parts = [f"{name}, learning rate {optim['lr']:g}"]
    if training["half_lr"]:
        stall = plural(training["lr_patience"], "epoch")
        parts.append(f"halved after {stall} without a better validation loss")
    if optim["weight_decay"]:
        parts.append(f"weight decay {optim['weight_decay']:g}")
    if training["ema"]:
        parts.append(f"the weights are a moving average with decay {training['ema']:g}")
    return ", ".join(parts)


def _describe_batches(training: dict) -> str:
    batches = training["aggregate"]
    steps = f", gradients of {batches} batches added up" if batches > 1 else ""
    return (
        f"{plural(training['batch_size'], 'item')} per device{steps}; gradient norm limited to"
        f" {training['clip_norm']:g}"
    )


def _describe_length(infos: dict, training: dict) -> str:
    """The epoch that the weights are from; epochs are counted from 0 in the files of a run."""
    limits = [f"{training['epochs']} epochs at most"] if training["epochs"] > 0 else []
    if training["early_stop"]:
        limits.append(f"or until {training['patience']} in a row were no better")
    text = ", ".join(limits) or "until it was stopped"
    if "epoch" not in infos:
        return text
    end = plural(infos["epoch"] + 1, "epoch")
    loss = f"the best validation loss: {infos['val_loss']:.5f}"
    return f"{text}; these weights are those after {end}, with {loss}"


def _describe_base(facts: Facts, training: dict) -> str:
    base = facts.infos.get("base_model")
    if not base:
        return "random weights"
    name = f"`{base['source']}`"
    if hub := facts.base_hub_name:
        name = f"[{hub}](https://huggingface.co/{hub})"
    parts = [f"{name}, SHA-256 `{base['sha256']}`"]
    if base["partial"]:
        parts.append("those of its tensors that fit")
    if training["freeze"]:
        parts.append(f"of which `{training['freeze']}` was not trained")
    return ", ".join(parts)


def _describe_versions(versions: dict) -> str:
    shown = [f"{PACKAGES.get(name, name)} {value}" for name, value in versions.items()]
    return escape(", ".join(shown)) or "unknown"
