"""`--freeze`: parts of a model that are not trained.

A part is named as its parameters are, up to a dot: separator.network.0, say.
"""

from torch import nn

from local.tools.command_line import suggest


def freeze(model: nn.Module, parts: str) -> None:
    """Takes parts out of training: their parameters get no gradient, and so no optimizer state.

    BN within them stays in eval mode: it normalises by its running statistics, and keeps them.

    Args:
        parts: names, separated by commas.
    """
    names = _read_names(parts)
    for name, parameter in model.named_parameters():
        if _is_within(name, names):
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if hasattr(module, "running_mean") and _is_within(name, names):
            module.eval()


def find_freeze_faults(model: nn.Module, parts: str) -> list[str]:
    """What is wrong with the parts to freeze, a line each."""
    names, parameters = _read_names(parts), [name for name, _ in model.named_parameters()]
    outer = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
    pieces = [name.split(".") for name in parameters]
    known = {".".join(piece[: end + 1]) for piece in pieces for end in range(len(piece))}
    faults = [
        f"--freeze: the model has no part {name!r}{suggest(name, known) or f'; it has {outer}'}"
        for name in names
        if name not in known
    ]
    if parameters and all(_is_within(name, names) for name in parameters):
        faults.append(f"--freeze {parts} leaves nothing to train; name fewer parts")
    return faults


def _read_names(parts: str) -> list[str]:
    return [name.strip().removesuffix(".") for name in parts.split(",")] if parts else []


def _is_within(name: str, parts: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)
