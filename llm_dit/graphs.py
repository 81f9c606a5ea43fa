"""A model's forward captured in CUDA graphs: one launch in the place of thousands.

Diffusion steps have static shapes, and a transformer of many small operations waits for the host between them. A graph is
captured for every signature (shapes, dtypes and values of all that is no tensor) when it comes for the second time, and replayed
from then on, with the inputs copied into its own. All graphs of a model share one memory pool.

A graph holds addresses and every Python value of its capture. So that it never replays what is no longer true, each call
compares a fingerprint of the model: its parameters' addresses, how int4 weights are multiplied, its modules, attention processors
and adapters. Another one drops the graphs: moving the model, fusing or scaling a LoRA, `set_int4_compute`, or another attention
backend are followed at the next call. Where a graph
cannot be right, the model runs as it is: with gradients, on the CPU, offloaded, or with a cache that decides step by step.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .names import first_line
from .quantization.sizes import plain_parts

logger = logging.getLogger(__name__)
MAX_GRAPHS: Final = 8
"""Graphs of a model that are kept; the one that was used longest ago goes first."""


@dataclass
class _Captured:
    """One graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any

    def replay(self, inputs: list[Tensor]) -> Any:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        # Copied, because the next replay overwrites it: guidance calls a model twice before it looks at either result.
        return tree_map(lambda value: value.clone() if torch.is_tensor(value) else value, self.output)


class GraphedForward:
    """Stands in the place of `model.forward`; see the module."""

    def __init__(self, model: nn.Module, function: Callable[..., Any] | None = None) -> None:
        self._start(model, function or model.__dict__.get("forward"))

    def _start(self, model: nn.Module, function: Callable[..., Any] | None) -> None:
        # Held weakly, because the model holds this: the graphs' memory is to go when its last user does, not at a collection.
        self._model = weakref.ref(model)
        self._function = function
        self._start_empty()

    def _start_empty(self) -> None:
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._fingerprint: int | None = None
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        model = self._living()
        signature = None if _must_run_eagerly(model, leaves) else _signature(leaves, spec)
        if signature is None or signature in self._refused:
            return self._forward(*args, **kwargs)
        fingerprint = _fingerprint(model)
        if fingerprint != self._fingerprint:
            self.drop()
            self._fingerprint = fingerprint
        if signature not in self._seen:
            self._seen.add(signature)
            return self._forward(*args, **kwargs)  # kernels are chosen, and compiled, outside of a capture
        if signature not in self._graphs and not self._capture(signature, leaves, spec):
            return self._forward(*args, **kwargs)
        self._graphs.move_to_end(signature)
        return self._graphs[signature].replay([leaf for leaf in leaves if torch.is_tensor(leaf)])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no graphs: a graph belongs to the addresses of one model."""
        return {"model": self._living(), "function": self._function}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(state["model"], state["function"])

    def drop(self) -> None:
        """Frees all graphs; the next calls capture anew."""
        self._graphs.clear()
        self._seen.clear()
        self._refused.clear()
        self._pool = self._stream = None

    @property
    def captured(self) -> int:
        """How many graphs are held."""
        return len(self._graphs)

    def _living(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("this forward was taken from a model that no longer exists: call the model")
        return model

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        model = self._living()
        return self._function(*args, **kwargs) if self._function else type(model).forward(model, *args, **kwargs)

    def _capture(self, signature: Hashable, leaves: list[Any], spec: Any) -> bool:
        own = [leaf.clone() if torch.is_tensor(leaf) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(own, spec)
        graph, device = torch.cuda.CUDAGraph(), next(leaf.device for leaf in own if torch.is_tensor(leaf))
        if self._pool is None:
            # A stream of the device that the model is on: torch's own for captures belongs to the device that is current.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        try:
            with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = self._forward(*args, **kwargs)
        except RuntimeError as error:
            logger.warning(
                "%s cannot be captured in a CUDA graph and runs without one: %s",
                type(self._living()).__name__,
                first_line(error),
            )
            self._refused.add(signature)
            return False
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)
        self._graphs[signature] = _Captured(graph, [leaf for leaf in own if torch.is_tensor(leaf)], output)
        return True


def graph_forward(model: nn.Module, function: Callable[..., Any] | None = None) -> GraphedForward:
    """Makes `model` capture and replay its forward.

    Args:
        function: what runs instead of the model's forward, e.g. that compiled.

    Returns:
        What stands in the forward's place; its `drop()` frees the graphs.
    """
    if isinstance(model.forward, GraphedForward):
        return model.forward
    graphed = GraphedForward(model, function)
    model.forward = graphed
    return graphed


def _must_run_eagerly(model: nn.Module, leaves: list[Any]) -> bool:
    tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not tensors
        or not all(tensor.is_cuda for tensor in tensors)
        or bool(getattr(model, "is_cache_enabled", False))
        or _is_hooked(model)
        or torch.cuda.is_current_stream_capturing()
    )


def _is_hooked(model: nn.Module) -> bool:
    """True if accelerate or diffusers acts around a forward: offloading, layerwise casting, caches."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if "_hf_hook" in module.__dict__ or (registry is not None and registry.hooks):
            return True
    return False


def _signature(leaves: list[Any], spec: Any) -> Hashable | None:
    """What a graph is captured for, or None if an argument has no value to compare."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    parts: list[Hashable] = [str(spec), torch.is_inference_mode_enabled(), autocast]
    for leaf in leaves:
        if torch.is_tensor(leaf):
            parts.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif isinstance(leaf, int | float | str | bool | torch.dtype | torch.device | None):
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts)


def _fingerprint(model: nn.Module) -> int:
    return hash(tuple(_traits(model)))


def _traits(model: Any) -> Iterator[Hashable]:
    """All that a capture bakes in, besides the inputs: addresses, and values that modules read in Python."""
    yield _AttentionBackendRegistry.get_active_backend()[0]  # what the context manager `attention_backend` sets, for all models
    for module in model.modules():
        yield id(module)
        for parameter in module._parameters.values():
            if parameter is not None:
                yield getattr(parameter, "fp8_compute", False)
                yield from (part.data_ptr() for part in plain_parts(parameter))
        for buffer in module._buffers.values():
            if buffer is not None:
                yield buffer.data_ptr()
        processor = getattr(module, "processor", None)
        if processor is not None:
            yield id(processor)
            yield str(getattr(processor, "_attention_backend", None))
        if hasattr(module, "lora_A"):
            yield (module.merged, module.disable_adapters, tuple(module.active_adapters), tuple(module.scaling.items()))
