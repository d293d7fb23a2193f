"""--ema: a moving average of the weights, which is what a run validates and keeps."""

from collections.abc import Sequence

from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from local.tools.private import move_average


class WeightAverage(WeightAveraging):
    """An exponential moving average of the weights, and of the buffers that are no whole numbers.

    After every step it is decay * average + (1 - decay) * weights; it begins with the weights after
    the first step. Validation is of the average, and checkpoints have it as `state_dict`; the
    weights that are trained are their `current_model_state`.

    On a GPU a step waits for the device, as torch reads how many weights it has averaged.

    Lightning's EMAWeightAveraging computes the same, but rounds weights that never change, and
    counters, away from what they are.
    """

    def __init__(self, decay: float):
        average_floats = get_ema_multi_avg_fn(decay)

        def average(averages: Sequence[Tensor], values: Sequence[Tensor], count) -> None:
            if averages[0].is_floating_point():  # all are of one kind
                average_floats(averages, values, count)
                return
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

        super().__init__(multi_avg_fn=average)

    def on_fit_start(self, trainer, pl_module):
        move_average(self, pl_module.device)
