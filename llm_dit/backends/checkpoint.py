"""Backend "checkpoint": an official fp8 checkpoint, kept in fp8. Its place and its hook are here; reading one is not yet."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from .base import ComponentRequest, LoadPlan


class CheckpointBackend:
    """Official fp8 checkpoints; see `Backend`. Every call is refused with what to do instead."""

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
        raise NotImplementedError(
            f"{request.name}: llm_dit cannot read official fp8 checkpoints yet (transformer_file, backend 'checkpoint'): "
            "load the bf16 weights with quantization_transformer='fp8-dynamic' instead"
        )
