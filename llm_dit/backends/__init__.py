"""Ways to get quantized weights into a component, one file each."""

from typing import Final

from .base import Backend, ComponentRequest, LoadPlan, Transform
from .checkpoint import CheckpointBackend
from .layerwise import LayerwiseBackend
from .torchao import TorchaoBackend

BACKENDS: Final[dict[str, Backend]] = {
    backend.name: backend for backend in (TorchaoBackend(), LayerwiseBackend(), CheckpointBackend())
}

__all__ = ["BACKENDS", "Backend", "ComponentRequest", "LoadPlan", "Transform"]
