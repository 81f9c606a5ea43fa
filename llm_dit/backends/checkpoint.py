"""Backend "checkpoint": a component read from a single file, its fp8 weights kept byte for byte.

Unlike the other backends it does not sit inside a library's loader: the file is not the folder's. The component is made empty,
planned against the file's header, filled, and passed to the pipeline.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from ..checkpoints.fill import load_component
from ..checkpoints.plan import Plan
from ..quantization.component import layer_stats
from ..quantization.hardware import require_support
from ..quantization.probe import probe_finite
from ..quantization.sizes import dense_bytes, model_bytes
from .base import ComponentRequest, LoadPlan
from .saving import attach_saver


class CheckpointBackend:
    """Single files; see `Backend`. Whether a request has a file is the pipeline's to know, so that what comes here has none."""

    name = "checkpoint"

    def check(self, request: ComponentRequest) -> None:
        self._refuse(request)

    def plan(self, model: nn.Module, request: ComponentRequest) -> LoadPlan:
        self._refuse(request)

    def finish(self, model: nn.Module, request: ComponentRequest, plan: LoadPlan) -> None:
        self._refuse(request)

    def quantize_in_place(self, model: nn.Module, request: ComponentRequest) -> dict[str, Any]:
        self._refuse(request)

    def _refuse(self, request: ComponentRequest) -> NoReturn:
        raise ValueError(
            f"{request.name}: backend 'checkpoint' reads a file, and there is none for it: give transformer_file or "
            "encoder_file, or leave quantization_backend out"
        )


def load_planned(model: nn.Module, plan: Plan, name: str, device: torch.device) -> dict[str, Any]:
    """Fills an empty `model` as planned, checks it and makes it save like any other.

    Returns:
        The stats of `quantize_component`.

    Raises:
        RuntimeError: if a quantized layer gives NaN.
    """
    wanted = plan.wanted
    load_component(model, plan, device)
    if wanted.method.make_config is not None:
        probe_finite(model)
        request = ComponentRequest(name, wanted.role, wanted.method, wanted.granularity, wanted.skip, wanted.dtype)
        attach_saver(model, request, plan.layers)
    before = dense_bytes(model, wanted.dtype)
    return layer_stats(plan.layers, wanted.method, wanted.role, wanted.granularity, before, model_bytes(model))


def require_kept_support(plan: Plan) -> None:
    """Raises ValueError if the device cannot run what `plan` asks for, naming what to use instead."""
    if plan.wanted.method.make_config is not None:
        require_support(plan.wanted.method, plan.wanted.granularity, plan.wanted.dtype)
