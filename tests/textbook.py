"""ConvTasNet straight from the paper's equations, in plain tensor operations on a state dict.

Shares no code with local/tasnet.py, and costs what the published code costs: the tests hold the
model to its numbers, tests/benchmark.py to its speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def separate(state: dict[str, Tensor], conf: dict, mixture: Tensor) -> Tensor:
    """(M, audio_channels, T) -> (M, C, audio_channels, T), as the model in eval mode."""
    L, C, channels = conf["L"], conf["C"], conf["audio_channels"]
    hop, (batch, _, time) = L // 2, mixture.shape
    if time < L:
        return mixture.new_zeros(batch, C, channels, time)

    weights = F.conv1d(mixture, state["encoder.conv1d_U.weight"], stride=hop).relu()

    net = "separator.network"
    hidden = layer_norm(state, f"{net}.0", weights, dims=(1,))
    residual = F.conv1d(hidden, state[f"{net}.1.weight"])
    for r in range(conf["R"]):
        for x in range(conf["X"]):
            residual = residual + block(state, conf, f"{net}.2.{r}.{x}.net", 2**x, residual)
    scores = F.conv1d(residual, state[f"{net}.3.weight"])
    scores = scores.reshape(batch, C, conf["N"], -1)
    masks = scores.softmax(1) if conf["mask_nonlinear"] == "softmax" else scores.relu()

    masked = (weights[:, None] * masks).transpose(2, 3)  # (M, C, K, N)
    signals = F.linear(masked, state["decoder.basis_signals.weight"])
    signals = signals.unflatten(-1, (channels, L)).transpose(2, 3)  # (M, C, channels, K, L)
    starts = hop * torch.arange(signals.shape[-2], device=mixture.device)
    positions = starts[:, None] + torch.arange(L, device=mixture.device)
    estimates = mixture.new_zeros(batch, C, channels, time)
    return estimates.index_add_(-1, positions.flatten(), signals.flatten(-2))


def block(state, conf: dict, name: str, dilation: int, residual: Tensor) -> Tensor:
    hidden = F.conv1d(residual, state[f"{name}.0.weight"])
    hidden = norm(state, conf, f"{name}.2", F.prelu(hidden, state[f"{name}.1.weight"]))

    taps, frames = state[f"{name}.3.net.0.weight"], hidden.shape[-1]
    reach = (conf["P"] - 1) * dilation
    padding = reach if conf["causal"] else reach // 2
    hidden = F.conv1d(hidden, taps, padding=padding, dilation=dilation, groups=len(taps))
    hidden = hidden[..., :frames]

    after = 2 if conf["causal"] else 1
    hidden = F.prelu(hidden, state[f"{name}.3.net.{after}.weight"])
    hidden = norm(state, conf, f"{name}.3.net.{after + 1}", hidden)
    return F.conv1d(hidden, state[f"{name}.3.net.{after + 2}.weight"])


def norm(state, conf: dict, name: str, hidden: Tensor) -> Tensor:
    if conf["norm_type"] == "id":
        return hidden
    if conf["norm_type"] == "BN":
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / torch.sqrt(variance + 1e-5)
        return (hidden - mean[:, None]) * scale[:, None] + state[f"{name}.bias"][:, None]
    return layer_norm(state, name, hidden, dims=(1,) if conf["norm_type"] == "cLN" else (1, 2))


def layer_norm(state, name: str, hidden: Tensor, dims: tuple) -> Tensor:
    mean = hidden.mean(dims, keepdim=True)
    centred = hidden - mean
    variance = (centred**2).mean(dims, keepdim=True)
    return state[f"{name}.gamma"] * centred / torch.sqrt(variance + 1e-8) + state[f"{name}.beta"]
