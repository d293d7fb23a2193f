"""ConvTasNet straight from the paper's equations, in plain tensor operations on a state dict.

Shares no code with local/tasnet.py, and no care for speed; the tests hold the model to it.
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

    windows = mixture.unfold(-1, L, hop)  # (M, channels, K, L)
    weights = torch.einsum("mckl,ncl->mnk", windows, state["encoder.conv1d_U.weight"]).clamp(min=0)

    net = "separator.network"
    hidden = layer_norm(state, f"{net}.0", weights, dims=(1,))
    residual = pointwise(state[f"{net}.1.weight"], hidden)
    for r in range(conf["R"]):
        for x in range(conf["X"]):
            residual = residual + block(state, conf, f"{net}.2.{r}.{x}.net", 2**x, residual)
    scores = pointwise(state[f"{net}.3.weight"], residual)
    scores = scores.reshape(batch, C, conf["N"], -1)
    masks = scores.softmax(1) if conf["mask_nonlinear"] == "softmax" else scores.clamp(min=0)

    masked = weights[:, None] * masks
    signals = torch.einsum("mcnk,sn->mcks", masked, state["decoder.basis_signals.weight"])
    estimates = mixture.new_zeros(batch, C, channels, time)
    for k in range(weights.shape[-1]):
        estimates[..., k * hop : k * hop + L] += signals[:, :, k].reshape(batch, C, channels, L)
    return estimates


def block(state, conf: dict, name: str, dilation: int, residual: Tensor) -> Tensor:
    hidden = pointwise(state[f"{name}.0.weight"], residual)
    hidden = norm(state, conf, f"{name}.2", prelu(state[f"{name}.1.weight"], hidden))

    taps, frames = state[f"{name}.3.net.0.weight"], hidden.shape[-1]
    reach = (conf["P"] - 1) * dilation
    before = reach if conf["causal"] else reach // 2
    padded = F.pad(hidden, (before, reach - before))
    hidden = sum(
        taps[:, 0, p, None] * padded[..., p * dilation : p * dilation + frames]
        for p in range(conf["P"])
    )

    after = 2 if conf["causal"] else 1
    hidden = prelu(state[f"{name}.3.net.{after}.weight"], hidden)
    hidden = norm(state, conf, f"{name}.3.net.{after + 1}", hidden)
    return pointwise(state[f"{name}.3.net.{after + 2}.weight"], hidden)


def pointwise(weight: Tensor, hidden: Tensor) -> Tensor:
    return torch.einsum("oi,mik->mok", weight[:, :, 0], hidden)


def prelu(slope: Tensor, hidden: Tensor) -> Tensor:
    return hidden.clamp(min=0) + slope * hidden.clamp(max=0)


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
    variance = ((hidden - mean) ** 2).mean(dims, keepdim=True)
    normalised = (hidden - mean) / torch.sqrt(variance + 1e-8)
    return state[f"{name}.gamma"] * normalised + state[f"{name}.beta"]
