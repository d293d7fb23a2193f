"""How far float32 may be from float64, seen from the model itself; no number fits all models."""

import copy

import torch
from conftest import forward
from torch.overrides import TorchFunctionMode

from local.tasnet import ConvTasNetStereo


class Rounding(TorchFunctionMode):
    """Errors of float32, drawn at random, in all that is computed under it in float64.

    Monte Carlo arithmetic (Parker 1997): to the result of every operation it adds a number that is
    evenly spread up to what so many roundings in float32 may change. A sum that cancels still
    shows what its terms lost. So its errors are as large as the root of the sum of its squared
    terms and of its own square; other results err in proportion to themselves.

    How many? A sum of n terms rounds n products and n partial sums, some sqrt(n) times as much as
    one of each: 8 for the widest sum of `model_confs`, of 3 channels by 21 samples. Wider sums go
    by several lanes at once. A norm, also where it is folded into gain and offset, rounds fewer
    than 8 times.
    """

    exact = ("view", "reshape", "transpose", "unsqueeze", "__getitem__", "pad", "relu")
    sums = ("conv1d", "linear", "fold", "mean", "add", "sub")

    def __init__(self, roundings: int = 8):
        super().__init__()
        self.most = roundings * torch.finfo(torch.float32).eps / 2  # a rounding changes eps / 2
        self.generator = torch.Generator().manual_seed(0)  # the global one stays as it is

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.__name__ in self.exact or not torch.is_tensor(result):
            return result
        errors = torch.empty_like(result).uniform_(-1, 1, generator=self.generator)
        scale = self._scale(result, function, args, kwargs)
        return errors.mul_(scale).mul_(self.most).add_(result)

    def _scale(self, result, function, args, kwargs):
        if function.__name__ == "batch_norm":  # |gain| (|x| + |mean|) + |offset|
            terms = {k: v.abs() if torch.is_tensor(v) else v for k, v in kwargs.items()}
            x, mean, variance = args
            return function(x.abs(), -mean.abs(), variance, **terms)
        if function.__name__ in self.sums:
            squares = [x * x if isinstance(x, (torch.Tensor, float)) else x for x in args]
            function = torch.add if function.__name__ == "sub" else function
            return torch.hypot(result, function(*squares, **kwargs).sqrt())
        return result


@torch.no_grad()
def allow_for_rounding(model: ConvTasNetStereo, mixture: torch.Tensor) -> tuple:
    """(estimates in float64, the norm of the most by which those in float32 may differ).

    The most is that of 16 runs with the errors of `Rounding`, so it grows where the model itself
    amplifies them, as a norm does of what is nearly constant; and where a sign hangs on them, it
    is the size of the change of sign.
    """
    exact, mixture = copy.deepcopy(model).double(), mixture.double()
    estimates = forward(exact, mixture)
    with Rounding():
        runs = exact(mixture.expand(16, *mixture.shape))
    differences = (runs - estimates).flatten(1).norm(dim=1)
    return estimates, differences.max() + 1e-7 * estimates.norm()


def assert_within_rounding(model, mixture, *estimates) -> None:
    """Holds estimates, and the plain forward, to what the model makes of the mixture in float64."""
    expected, most = allow_for_rounding(model, mixture)
    for number, found in enumerate([forward(model, mixture), *estimates]):
        assert found.shape == expected.shape, number
        assert (found - expected).norm() <= most, number
