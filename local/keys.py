"""The keys of conf.yml and flags of train.py: one table, and what their values may be."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from local.tools.choices import FAST, MEMORY, MISSING_STEMS, SUFFIX

INTERVAL = re.compile(r"(?:(\d*\.?\d+) ?min|(\d+) ?steps?)")


class Key(NamedTuple):
    """A key of conf.yml and flag of train.py. Its default and its help are in conf.yml.

    Args:
        least: the smallest value.
        most: the largest value.
        below: a number above all values.
        above_zero: any number above zero.
        limit: at least 1, or -1 for no limit.
        choices: all there are.
        is_path: whether ~ stands for a home folder.
        is_free: whether a resumed run computes the same with another value. Of the tracks under
            root and of the devices, it matters what they are, not how they are named.
    """

    kind: type
    least: int | None = None
    most: float = math.inf
    below: float = math.inf
    above_zero: bool = False
    limit: bool = False
    choices: tuple[str, ...] = ()
    is_path: bool = False
    is_free: bool = False


KEYS = {
    "convtasnet": {  # local/tasnet.py checks their values
        "N": Key(int),
        "L": Key(int),
        "B": Key(int),
        "H": Key(int),
        "P": Key(int),
        "X": Key(int),
        "R": Key(int),
        "C": Key(int),
        "audio_channels": Key(int),
        "norm_type": Key(str),
        "causal": Key(bool),
        "mask_nonlinear": Key(str),
    },
    "training": {
        "model": Key(str),
        "init": Key(str, is_path=True),
        "init_partial": Key(bool),
        "init_sha256": Key(str),
        "freeze": Key(str),
        "epochs": Key(int, limit=True, is_free=True),
        "batch_size": Key(int, least=1),
        "num_workers": Key(int, least=0, is_free=True),
        "half_lr": Key(bool),
        "lr_patience": Key(int, least=0),
        "early_stop": Key(bool),
        "patience": Key(int, least=1),
        "keep_best": Key(int, least=1, is_free=True),
        "loss": Key(str),  # local/losses.py has the choices
        "clip_norm": Key(float, above_zero=True),
        "ema": Key(float, least=0, below=1),
        "aggregate": Key(int, least=1),
        "seed": Key(int, least=0),
        "accelerator": Key(str, choices=("auto", "cpu", "gpu"), is_free=True),
        "devices": Key(str, is_free=True),
        "num_nodes": Key(int, least=1, is_free=True),
        "precision": Key(str, choices=("32-true", "bf16-mixed", "16-mixed")),
        "compile": Key(str, choices=("auto", "yes", "no")),
        "memory": Key(str, choices=MEMORY),
        "fast": Key(str, choices=FAST),
        "valid_method": Key(str, choices=("full", "overlap-add")),
        "examples": Key(int, least=0, is_free=True),
        "max_steps": Key(int, limit=True),
        "max_skipped_steps": Key(int, least=1, is_free=True),
        "checkpoint_every": Key(str, is_free=True),
    },
    "optim": {
        "optimizer": Key(str, choices=("adam", "adamw")),
        "lr": Key(float, above_zero=True),
        "weight_decay": Key(float, least=0),
    },
    "data": {
        "root": Key(list, is_path=True, is_free=True),
        "mix_background": Key(bool),
        "segment": Key(float, above_zero=True),
        "samples_per_track": Key(int, least=1),
        "mix_tracks": Key(bool),
        "gain_min": Key(float, least=0),
        "gain_max": Key(float, above_zero=True),
        "swap": Key(float, least=0, most=1),
        "sample_rate": Key(int),
        "suffix": Key(str, choices=SUFFIX, is_free=True),
        "stem_names": Key(str),
        "missing_stems": Key(str, choices=MISSING_STEMS),
        "valid_tracks": Key(str, is_path=True, is_free=True),
        "max_valid_tracks": Key(int, limit=True),
    },
    "main_args": {"exp_dir": Key(str, is_path=True, is_free=True)},
}
FREE = {name for keys in KEYS.values() for name, key in keys.items() if key.is_free}


def find_faults(conf: dict, knows_model: bool = True) -> list[str]:
    """What is wrong with the values of a configuration, a line each, named by their flags.

    Args:
        knows_model: whether the keys of the model have their values; not where --init, from which
            they come, cannot be loaded.
    """
    import torch

    from local.losses import LOSSES
    from local.models import find_model_faults
    from local.musdb18_tracks import find_data_faults

    values = {name: conf[section][name] for section, keys in KEYS.items() for name in keys}
    faults = []
    for keys in KEYS.values():
        for name, key in keys.items():
            faults += [
                f"--{name} must be {rule}, got {values[name]}"
                for rule in _find_broken_rules(values[name], key)
            ]
    if read_interval(values["checkpoint_every"]) is None:
        faults.append(
            "--checkpoint_every must look like '30 min' or '500 steps',"
            f" got '{values['checkpoint_every']}'"
        )
    faults += find_data_faults(conf["data"])
    if not values["exp_dir"]:
        faults.append("--exp_dir must not be empty")
    if values["loss"] not in LOSSES:
        faults.append(
            f"--loss must be one of {', '.join(LOSSES)} (local/losses.py), got {values['loss']}"
        )
    if values["gain_min"] > values["gain_max"]:
        faults.append(
            f"--gain_min must not be above --gain_max, got {values['gain_min']} and"
            f" {values['gain_max']}"
        )
    if values["accelerator"] == "gpu" and not torch.cuda.is_available():
        faults.append("--accelerator gpu: torch sees no GPU; use auto or cpu")
    return faults + (find_model_faults(conf) if knows_model else [])


def _find_broken_rules(value, key: Key) -> Iterator[str]:
    """What a value must be and is not."""
    if key.least is not None and not (key.least <= value <= key.most and value < key.below):
        most = f" and at most {key.most}" if key.most < math.inf else ""
        below = f" and below {key.below}" if key.below < math.inf else ""
        yield f"at least {key.least}{most}{below}"
    if key.above_zero and not 0 < value < math.inf:
        yield "a number above 0"
    if key.limit and value < 1 and value != -1:
        yield "at least 1, or -1 for no limit"
    if key.choices and value not in key.choices:
        yield f"one of {', '.join(key.choices)}"


def read_interval(text: str) -> tuple[float, int] | None:
    """(seconds, steps), one of them infinite or 0, of "30 min" or "500 steps"; None of others."""
    found = INTERVAL.fullmatch(text)
    if not found or float(found[1] or found[2]) == 0:
        return None
    return 60 * float(found[1] or math.inf), int(found[2] or 0)
