"""What to quantize in a pipeline, role by role: the value that configuration files, keyword arguments and defaults end up in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..names import BACKENDS, COMPONENT_TYPES, GRANULARITIES, check_name
from .filters import VAE_METHODS, check_patterns, vae_refusal
from .methods import get_method


@dataclass(frozen=True)
class PipelineQuantConfig:
    """A method for each role of a pipeline.

    Attributes:
        encoder: method of text and image encoders, prompt enhancers and LTX-2's connectors.
        transformer: method of the denoiser, controlnets and diffusion decoders.
        vae: method of VAEs, audio VAEs, vocoders and latent upsamplers ("none" or "int8").
        granularity: "per-row" or "per-tensor", read by the fp8 methods.
        skip: name patterns left in bf16, in every component.
        backend: how quantized weights get into a component, "torchao", "layerwise" or "checkpoint": one name, or a
            mapping from roles or component names.

    Raises:
        ValueError: for an unknown or removed value, with the one to use instead.
    """

    encoder: str = "none"
    transformer: str = "none"
    vae: str = "none"
    granularity: str = "per-row"
    skip: Sequence[str] = ()
    backend: str | Mapping[str, str] = "torchao"

    def __post_init__(self) -> None:
        for role in COMPONENT_TYPES:
            object.__setattr__(self, role, get_method(getattr(self, role), f"{role} method").name)
        if self.vae not in VAE_METHODS:
            raise ValueError(vae_refusal(self.vae))
        check_name(self.granularity, GRANULARITIES, "granularity")
        for backend in [self.backend] if isinstance(self.backend, str) else self.backend.values():
            check_name(backend, BACKENDS, "quantization_backend")
        object.__setattr__(self, "skip", check_patterns(self.skip, "skip"))
