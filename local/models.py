"""The models that can be trained. Add your own to MODELS.

A model is a module that maps (M, audio_channels, T) to (M, C, audio_channels, T) for any T. Its
constructor takes the keywords `C`, `audio_channels` and `samplerate`, and those in the section of
its name in conf.yml:

    MODELS = {..., "MyNet": MyNet}      # in this file
    model: MyNet                        # in conf.yml, under training
    MyNet: {width: 64}                  # in conf.yml, at the end

Two attributes are optional: `block_class`, the class of the modules that `--memory some`
recomputes; and `encoder.length`, the least number of samples of an input.
"""

import inspect
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from local.tasnet import ConvTasNetStereo
from local.tools.command_line import brief
from local.tools.freeze import find_freeze_faults
from local.tools.random_states import keep_random_states

MODELS: dict[str, type[nn.Module]] = {"ConvTasNetStereo": ConvTasNetStereo}
PUBLISHED = "ConvTasNetStereo"  # its keywords are in the section convtasnet, and are flags
SHARED = ("C", "audio_channels", "samplerate")  # keywords of every model


def build_model(name: str, keywords: Mapping) -> nn.Module:
    """A model with new weights, and with the SHARED keywords as attributes.

    Raises:
        ValueError, TypeError: `name` is not in MODELS, or its constructor refuses the keywords.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name}; local/models.py has {', '.join(MODELS)}")
    model = MODELS[name](**keywords)
    for key in SHARED:
        if not hasattr(model, key):
            setattr(model, key, keywords[key])
    return model


def sketch_model(name: str, keywords: Mapping) -> nn.Module:
    """As build_model, but on the meta device if possible, where weights take no memory; silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # build_model warns later
        try:
            with torch.device("meta"):
                return build_model(name, keywords)
        except (ValueError, TypeError):
            raise
        except Exception:  # some constructors read the values of their tensors
            with keep_random_states(torch.device("cpu")):
                return build_model(name, keywords)


def least_samples(model: nn.Module) -> int:
    """The shortest input of a model: `encoder.length`, or 1 if it has none."""
    return getattr(getattr(model, "encoder", None), "length", 1)


def find_shape_fault(model: nn.Module, samples: int) -> str:
    """What is wrong with the shape of a sketched model's estimates; "" if it is right, or unknown
    without computing them.
    """
    mixture = torch.empty(1, model.audio_channels, samples, device="meta")
    expected = (1, model.C, model.audio_channels, samples)
    try:
        with torch.no_grad():
            shape = tuple(model(mixture).shape)
    except Exception:  # the first training step checks it again
        return ""
    if shape == expected:
        return ""
    return f"estimates must be {expected} for a mixture of {tuple(mixture.shape)}, got {shape}"


def find_keyword_faults(name: str, keywords) -> list[str]:
    """The keywords that a model of MODELS does not take, a line each, named as in conf.yml."""
    if not isinstance(keywords, dict):
        return [f"{name}: expected a section with keywords of the model, got {keywords!r}"]
    known = inspect.signature(MODELS[name]).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return []
    own = [key for key in known if key not in SHARED]
    return [
        f"{name}.{key}: unknown key; {name} takes {', '.join(own) or 'none'}"
        for key in keywords
        if key not in own
    ]


def model_name(conf: dict) -> str:
    """The model that a configuration names; in those of the first versions, PUBLISHED."""
    return conf.get("training", {}).get("model", PUBLISHED)


def model_args(conf: dict) -> dict:
    """The keywords that a configuration has for the model's constructor."""
    network, name = conf["convtasnet"], model_name(conf)
    if name != PUBLISHED:
        shared = {key: network[key] for key in ("C", "audio_channels")}
        network = {**conf.get(name, {}), **shared}
    return {**network, "samplerate": conf["data"]["sample_rate"]}


def model_settings(name: str, arguments: Mapping) -> dict[str, dict]:
    """section -> key -> value of a model: what `model_name` and `model_args` read."""
    network = dict(arguments)
    settings = {"training": {"model": name}, "data": {"sample_rate": network.pop("samplerate")}}
    if name == PUBLISHED:
        return {**settings, "convtasnet": network}
    shared = {key: network.pop(key) for key in ("C", "audio_channels")}
    return {**settings, "convtasnet": shared, name: network}


def make_model(conf: dict) -> nn.Module:
    """The model of a configuration, with new weights."""
    return build_model(model_name(conf), model_args(conf))


def count_parameters(conf: dict) -> int:
    """The number of parameters of the model of a valid configuration."""
    model = sketch_model(model_name(conf), model_args(conf))
    return sum(parameter.numel() for parameter in model.parameters())


def find_model_faults(conf: dict) -> list[str]:
    """What is wrong with the model of a configuration, a line each, named by its flag."""
    name, data, network = model_name(conf), conf["data"], conf["convtasnet"]
    faults, targets = [], 2 if data["mix_background"] else 4
    if network["C"] != targets:
        word = "yes" if data["mix_background"] else "no"
        faults.append(f"--C must be {targets} with --mix_background {word}, got {network['C']}")
    if network["audio_channels"] != 2:
        faults.append(f"--audio_channels must be 2 (stereo), got {network['audio_channels']}")
    if name not in MODELS:
        known = ", ".join(MODELS)
        return [*faults, f"--model must be one of {known} (local/models.py), got {name}"]
    try:
        model = sketch_model(name, model_args(conf))
    except (ValueError, TypeError) as error:
        if name == PUBLISHED:
            return faults + [f"--{fault}" for fault in str(error).split("; ")]
        return [*faults, f"{name} in conf.yml: {brief(error)}"]
    least = least_samples(model)
    if 0 < data["segment"] * data["sample_rate"] < least:
        frame = f"--L {least}" if name == PUBLISHED else f"{least} samples of {name}"
        faults.append(f"--segment {data['segment']} is shorter than a frame ({frame})")
    elif fault := find_shape_fault(model, int(data["segment"] * data["sample_rate"])):
        faults.append(f"--model {name}: {fault}")
    return faults + find_freeze_faults(model, conf["training"]["freeze"])
