"""What counting cannot see, measured: `constants.json`, which `llm-dit bench calibrate --fit` writes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

PATH: Final = Path(__file__).with_name("constants.json")


class Correction(BaseModel):
    """From counted bytes to bytes that are taken: `factor` times as many, and so many more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float
    extra_bytes: int

    def apply(self, counted: int) -> int:
        """Bytes to expect."""
        return int(self.factor * counted) + self.extra_bytes


class LoadCost(BaseModel):
    """Bytes of a load beyond what is then held: buffers to read into, and chunks of a weight in 32 bits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device_bytes: int
    host_bytes: int


class Constants(BaseModel):
    """All of them.

    Attributes:
        context_bytes: what CUDA and the kernels take of the card before a tensor is there.
        phases: by phase ("encode", "denoise", "decode"), what workspaces add to the activations.
        decoders: the same for the decode of a class of VAE that was measured; cuDNN takes more for some than for others.
        vae_encode: the same for the encode of every VAE, which takes cuDNN's workspaces too.
        load: what loading takes beside the weights.
        slack: share of weights and activations that the allocator holds and cannot use.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    context_bytes: int
    phases: dict[str, Correction]
    decoders: dict[str, Correction]
    vae_encode: Correction
    load: LoadCost
    slack: float

    def correct(self, phase: str, role: str, class_name: str, counted: int) -> int:
        """Bytes to expect of a component of that role and class, where so many are counted."""
        if (phase, role) == ("encode", "vae"):
            return self.vae_encode.apply(counted)
        found = self.decoders.get(class_name) if phase == "decode" else None
        return (found or self.phases[phase]).apply(counted)


@cache
def constants() -> Constants:
    """Those of the file."""
    return Constants.model_validate_json(PATH.read_text(encoding="utf-8"))
