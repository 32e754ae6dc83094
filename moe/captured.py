"""A training step, or a forward alone, as one CUDA graph: the device does not wait for the host.

A compiled step of DistilGPT2's size is some hundred kernels; launching them takes the host as long as running takes
the device. A graph is launched at once. What changes between steps (batch, λ, τ, prices, weights) lies in tensors that
keep their place, so one capture serves a whole trial.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 2
MAX_GRAPHS = 4  # each holds the activations of a batch


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


def pointers(model: Any) -> tuple[int, ...]:
    """Where the weights and the routers' buffers lie; a graph serves them there alone."""
    return tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))


def _forget(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


class CapturedForward:
    """Calls a model's forward, and from the third call of a kind on replays it as a CUDA graph.

    Calls are of one kind where their tensors have the same shapes, everything else in them is equal, so is what the
    routers keep outside tensors, and weights and buffers lie where they lay. What a replay returns are the same tensors
    every time, overwritten by the next one. Where nothing is on a GPU, a kind cannot be captured (a warning) or there
    are MAX_GRAPHS, the forward runs as it is.

    Args:
        model: whose routers are looked at. forward: takes the model's keyword arguments; must not wait for the device.
    """

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self._kinds: dict[Any, _Kind] = {}

    @torch.no_grad()
    def __call__(self, **kwargs: Any) -> Any:
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        if not tensors or not all(value.is_cuda for value in tensors.values()):
            return self.forward(**kwargs)
        rest = tuple(sorted((name, value) for name, value in kwargs.items() if name not in tensors))
        shapes = tuple((name, value.shape, value.dtype) for name, value in sorted(tensors.items()))
        routers = getattr(self.model, "routers", ())  # a dense model has none
        state = tuple((router.keep_first, getattr(router, "active", None)) for router in routers)
        key = (shapes, rest, state, self.model.training, pointers(self.model))
        kind = self._kinds.setdefault(key, _Kind())
        kind.calls += 1
        if kind.graph is None and kind.calls > WARM_UP_CALLS and kind.capturable and self._graphs() < MAX_GRAPHS:
            self._capture(kind, tensors, dict(rest))
        if kind.graph is None:
            return self.forward(**kwargs)
        for name, value in tensors.items():
            kind.inputs[name].copy_(value, non_blocking=True)
        kind.graph.replay()
        return kind.output

    def _graphs(self) -> int:
        return sum(kind.graph is not None for kind in self._kinds.values())

    def _capture(self, kind: _Kind, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        kind.inputs = {name: value.clone() for name, value in tensors.items()}
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # monitors run in other threads
                kind.output = self.forward(**kind.inputs, **rest)
        except RuntimeError as problem:
            kind.capturable, kind.output = False, None
            warnings.warn(f"the forward runs without a graph: {str(problem).splitlines()[0]}", stacklevel=3)
        else:
            kind.graph = graph


class _Kind:
    """Calls of one kind, and the graph that serves them."""

    def __init__(self) -> None:
        self.calls, self.capturable = 0, True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, Tensor] = {}
        self.output: Any = None
