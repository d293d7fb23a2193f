"""The models that can be trained. Another one is entered here, by name.

A model is a module that maps (M, audio_channels, T) to (M, C, audio_channels, T) for any T. Its
constructor takes `C`, `audio_channels` and `samplerate` as keywords; any others stand in a section
of its name in conf.yml:

    MODELS = {..., "MyNet": MyNet}      # here
    model: MyNet                        # conf.yml, under training
    MyNet: {width: 64}                  # conf.yml, at the end

`block_class`, where a model has it, names the class of what `--memory some` computes again;
`encoder.length` the samples that it needs at least.
"""

import inspect
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from local.tasnet import ConvTasNetStereo
from local.tools.command_line import brief
from local.tools.random_states import keep_random_states

MODELS: dict[str, type[nn.Module]] = {"ConvTasNetStereo": ConvTasNetStereo}
PUBLISHED = "ConvTasNetStereo"  # its keywords stand in the section convtasnet, and are flags
SHARED = ("C", "audio_channels", "samplerate")  # keywords of every model


def build_model(name: str, keywords: Mapping) -> nn.Module:
    """A model with new weights, that knows what is asked of any: SHARED.

    Raises:
        ValueError, TypeError: there is no such model, or it cannot be made with these keywords.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name}; local/models.py has {', '.join(MODELS)}")
    model = MODELS[name](**keywords)
    for key in SHARED:
        if not hasattr(model, key):
            setattr(model, key, keywords[key])
    return model


def sketch_model(name: str, keywords: Mapping) -> nn.Module:
    """The same without its weights, where a model can be made without, and without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # making the model in earnest warns
        try:
            with torch.device("meta"):
                return build_model(name, keywords)
        except (ValueError, TypeError):
            raise
        except Exception:  # some constructors compute with what they make
            with keep_random_states(torch.device("cpu")):
                return build_model(name, keywords)


def least_samples(model: nn.Module) -> int:
    """The shortest input that a model should get: a filter, where it names its length."""
    return getattr(getattr(model, "encoder", None), "length", 1)


def find_shape_fault(model: nn.Module, samples: int) -> str:
    """What is wrong with the shape of a sketched model's estimates; nothing where they are right,
    or where it cannot be told without computing them.
    """
    mixture = torch.empty(1, model.audio_channels, samples, device="meta")
    expected = (1, model.C, model.audio_channels, samples)
    try:
        with torch.no_grad():
            shape = tuple(model(mixture).shape)
    except Exception:  # the first step will tell
        return ""
    if shape == expected:
        return ""
    return f"estimates must be {expected} for a mixture of {tuple(mixture.shape)}, got {shape}"


def find_keyword_faults(name: str, keywords) -> list[str]:
    """What a model of MODELS does not take of its section in conf.yml, a line each."""
    if not isinstance(keywords, dict):
        return [f"{name}: expected keywords of the model, got {keywords!r}"]
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
    """The model that a configuration names; the first versions of this recipe named none."""
    return conf.get("training", {}).get("model", PUBLISHED)


def model_args(conf: dict) -> dict:
    """The keywords of the model's constructor in a configuration."""
    network, name = conf["convtasnet"], model_name(conf)
    if name != PUBLISHED:
        shared = {key: network[key] for key in ("C", "audio_channels")}
        network = {**conf.get(name, {}), **shared}
    return {**network, "samplerate": conf["data"]["sample_rate"]}


def make_model(conf: dict) -> nn.Module:
    """The model of a configuration, with new weights."""
    return build_model(model_name(conf), model_args(conf))


def count_parameters(conf: dict) -> int:
    """Those of the model of a valid configuration."""
    model = sketch_model(model_name(conf), model_args(conf))
    return sum(parameter.numel() for parameter in model.parameters())


def find_model_faults(conf: dict) -> list[str]:
    """What is wrong with the model of a configuration, a line each, named by flags."""
    name, data = model_name(conf), conf["data"]
    if name not in MODELS:
        return [f"--model must be one of {', '.join(MODELS)} (local/models.py), got {name}"]
    try:
        model = sketch_model(name, model_args(conf))
    except (ValueError, TypeError) as error:
        if name == PUBLISHED:
            return [f"--{fault}" for fault in str(error).split("; ")]
        return [f"{name} in conf.yml: {brief(error)}"]
    least = least_samples(model)
    if 0 < data["segment"] * data["sample_rate"] < least:
        frame = f"--L {least}" if name == PUBLISHED else f"{least} samples of {name}"
        return [f"--segment {data['segment']} is shorter than a frame ({frame})"]
    fault = find_shape_fault(model, int(data["segment"] * data["sample_rate"]))
    return [f"--model {name}: {fault}"] if fault else []
