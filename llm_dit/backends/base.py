"""The seam between loading and quantizing: a backend says, per parameter, what becomes of it while it is read.

The loaders of diffusers and transformers ask for a plan of the meta model (`Backend.plan`), read the checkpoint one
parameter at a time and hand each planned one to its transform (`llm_dit.backends.streaming`). Afterwards
`Backend.finish` checks the model against the plan, and leaves it so that it saves, moves and runs like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..quantization.filters import Layer
from ..quantization.methods import Method

Transform = Callable[[Tensor, torch.device], Tensor]
"""(parameter as read, device that will hold it) -> what the model holds instead."""


@dataclass(frozen=True)
class ComponentRequest:
    """What is asked for one component.

    Attributes:
        name: its name in the pipeline.
        role: "encoder", "transformer" or "vae".
        method: how to quantize it; never "none".
        granularity: of the fp8 methods.
        skip: name patterns to leave alone besides the role's own.
        dtype: dtype of what is not quantized, and of the computation.
    """

    name: str
    role: str
    method: Method
    granularity: str = "per-row"
    skip: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class LoadPlan:
    """What becomes of the parameters of one component.

    Attributes:
        layers: every layer with its configuration or the reason to leave it alone.
        transforms: by the exact name of a parameter, what is done to it while it is read.
    """

    layers: tuple[Layer, ...]
    transforms: Mapping[str, Transform]


class Backend(Protocol):
    """One way to get quantized weights into a component."""

    name: str

    def check(self, request: ComponentRequest) -> None:
        """Raises ValueError, before anything is read, for a request this backend cannot do."""

    def plan(self, model: nn.Module, request: ComponentRequest) -> LoadPlan:
        """The plan for `model`, which is on meta."""

    def finish(self, model: nn.Module, request: ComponentRequest, plan: LoadPlan) -> None:
        """Checks a loaded `model` against its plan and prepares it for saving.

        Raises:
            RuntimeError: if a layer is not what the plan says.
        """

    def quantize_in_place(self, model: nn.Module, request: ComponentRequest) -> dict[str, Any]:
        """Quantizes a component that was passed in; returns the stats of `quantize_component`."""
