"""Forward and backward of a training step as one CUDA graph, so that the device does not wait for the host.

A compiled step of DistilGPT2's size is some hundred kernels; launching them takes the host as long as running takes
the device. A graph is launched at once. What changes between steps (batch, λ, τ, prices, weights) lies in tensors that
keep their place, so one capture serves a whole trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WARM_UP_CALLS = 2


class CapturedBackward:
    """Replays ``backward`` on batches of one shape.

    Gradients are overwritten at every call, not accumulated, and keep their place: set none of them to None.

    Args:
        backward: runs forward and backward on a batch [B, S] and returns what to report, a tensor. It must not wait for
            the device. Its first calls, before the capture, leave traces in buffers and random state: save them before.
        parameters: whose gradients it fills.
        example_BS: a batch; later ones have its shape.
    """

    def __init__(
        self, backward: Callable[[Tensor], Tensor], parameters: Iterable[torch.nn.Parameter], example_BS: Tensor
    ) -> None:
        parameters = list(parameters)
        self._backward = backward  # the graph reads what the model owns, buffers too: it must not be let go of
        self._batch_BS = example_BS.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                _forget(parameters)
                backward(self._batch_BS)
            _forget(parameters)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # monitors run in other threads
            self._report = backward(self._batch_BS)

    def __call__(self, batch_BS: Tensor) -> Tensor:
        """Fill the gradients of this batch; returns what ``backward`` returned, as a new tensor."""
        assert batch_BS.shape == self._batch_BS.shape, "a graph serves batches of one shape"
        self._batch_BS.copy_(batch_BS, non_blocking=True)
        self._graph.replay()
        return self._report.clone()


def _forget(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
