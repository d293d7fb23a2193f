"""The passes of a training step as CUDA graphs: a step has some two thousand kernels, which the CPU
takes longer to launch than the GPU to run.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from local.fast.packed import product_dtype


class GraphedForward:
    """A forward pass that, with its backward pass, is captured at the first batch and replayed for
    those that follow, with the same numbers.

    It is captured anew for a batch of another shape or dtype, and where parameters have moved or
    begun to need gradients. The backward pass of a batch must come before the next batch, whose
    estimates take the place of its own.

    Args:
        forward: maps mixtures (M, audio_channels, T) to estimates, and changes nothing else.
        parameters: what it computes with, and the gradients of which are wanted.
    """

    def __init__(self, forward: Callable, parameters: Iterable[nn.Parameter]):
        self._forward, self._parameters = forward, tuple(parameters)
        self.release()

    def release(self) -> None:
        """Gives up the memory of the graphs, until the next batch."""
        self._state = self._graphs = None

    def __call__(self, mixture: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._forward(mixture)
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        state = self._describe(mixture)
        if state != self._state:
            self.release()
            self._graphs = _Graphs(self._forward, trained, mixture)
            self._state = state
        return _Replay.apply(self._graphs, mixture, *trained)

    def _describe(self, mixture: Tensor) -> tuple:
        """What the graphs rely on."""
        places = [(p.data_ptr(), p.requires_grad) for p in self._parameters]
        return mixture.shape, mixture.dtype, product_dtype(mixture), *places


def give_back_memory(forward: Callable) -> None:
    """Gives back the GPU memory that training through a forward pass holds between its steps."""
    if isinstance(forward, GraphedForward):
        forward.release()
    torch.cuda.empty_cache()


class _Graphs:
    """A forward and a backward pass, with tensors of their own for what goes in and comes out."""

    def __init__(self, forward: Callable, trained: list[nn.Parameter], mixture: Tensor):
        self._forward, self._trained, self._mixture = forward, trained, mixture.clone()
        self._passes = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._run = 0  # of the forward pass whose activations are there
        self._warm_up()
        stream, pool = _get_stream(mixture.device), torch.cuda.graph_pool_handle()
        for graph, run in zip(self._passes, (self._run_forward, self._run_backward), strict=True):
            # Threads that load batches may ask the driver for memory meanwhile.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                run()
        self._estimates = self._estimates.detach()  # or the graph of autograd would live on

    def _warm_up(self) -> None:
        """Kernels are compiled and libraries take memory, which cannot be captured."""
        stream, current = _get_stream(self._mixture.device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._run_forward()
            self._grad = torch.zeros_like(self._estimates)
            self._run_backward()
        current.wait_stream(stream)
        del self._estimates, self._grads

    def _run_forward(self) -> None:
        device = self._mixture.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Autocast would keep copies of the weights, which would then never change.
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            self._estimates = self._forward(self._mixture)

    def _run_backward(self) -> None:
        with torch.autocast(self._mixture.device.type, enabled=False):
            self._grads = torch.autograd.grad(self._estimates, self._trained, self._grad)

    def replay_forward(self, mixture: Tensor) -> tuple[Tensor, int]:
        """(the estimates, the number of this run)."""
        self._mixture.copy_(mixture)
        self._passes[0].replay()
        self._run += 1
        return self._estimates.detach(), self._run

    def replay_backward(self, grad: Tensor, run: int) -> tuple[Tensor, ...]:
        """The gradients of the parameters, which autograd copies: they are overwritten."""
        if run != self._run:
            raise RuntimeError(
                "the backward pass of a batch comes after the next batch, or twice, but its"
                " activations are gone; with --compile no they are kept"
            )
        self._run += 1
        self._grad.copy_(grad)
        self._passes[1].replay()
        return self._grads


@functools.cache
def _get_stream(device: torch.device) -> torch.cuda.Stream:
    """A single one, since cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs, mixture, *trained):
        ctx.graphs = graphs
        estimates, ctx.run = graphs.replay_forward(mixture)
        return estimates

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, *ctx.graphs.replay_backward(grad, ctx.run)
