"""What to quantize in a pipeline, role by role: the value that configuration files, keyword arguments and defaults end up in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .methods import check_granularity, get_method, nearest

BACKENDS: Final = ("torchao", "layerwise", "checkpoint")


def check_backend(backend: str, where: str = "quantization_backend") -> str:
    """Returns `backend`; raises ValueError, naming `where` and the nearest valid one, if there is no such."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown {where} {backend!r}: {nearest(backend, BACKENDS)}")
    return backend


@dataclass(frozen=True)
class PipelineQuantConfig:
    """A method for each role of a pipeline.

    Attributes:
        encoder: method of text and image encoders, prompt enhancers and LTX-2's connectors.
        transformer: method of the denoiser, controlnets and diffusion decoders.
        vae: method of VAEs, audio VAEs, vocoders and latent upsamplers ("none" or "int8").
        granularity: "per-row" or "per-tensor", read by the fp8 methods.
        skip: name patterns left in bf16, in every component.
        backend: how the transformer gets its quantized weights; "torchao", "layerwise" or "checkpoint".

    Raises:
        ValueError: for an unknown or removed value, with the one to use instead.
    """

    encoder: str = "none"
    transformer: str = "none"
    vae: str = "none"
    granularity: str = "per-row"
    skip: tuple[str, ...] = ()
    backend: str = "torchao"

    def __post_init__(self) -> None:
        for role in ("encoder", "transformer", "vae"):
            object.__setattr__(self, role, get_method(getattr(self, role), f"{role} method").name)
        check_granularity(self.granularity)
        check_backend(self.backend, "backend")
        if isinstance(self.skip, str):
            raise ValueError(f"skip must be a list of name patterns, not the string {self.skip!r}: write [{self.skip!r}]")
        object.__setattr__(self, "skip", tuple(self.skip))
