"""What to quantize in a pipeline, role by role: the value that configuration files, keyword arguments and defaults end up in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..names import BACKENDS, GRANULARITIES, check_name
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
        for role in ("encoder", "transformer", "vae"):
            object.__setattr__(self, role, get_method(getattr(self, role), f"{role} method").name)
        check_name(self.granularity, GRANULARITIES, "granularity")
        for backend in [self.backend] if isinstance(self.backend, str) else self.backend.values():
            check_name(backend, BACKENDS, "quantization_backend")
        if isinstance(self.skip, str):
            raise ValueError(f"skip must be a list of name patterns, not the string {self.skip!r}: write [{self.skip!r}]")
        object.__setattr__(self, "skip", tuple(self.skip))
