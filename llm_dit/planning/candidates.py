"""What can be chosen, and in which order: the least expected loss of quality first, then the least time.

The order stands here as data, each row with the evidence for it. Losses are expected LPIPS distances to the picture of the bf16
model at the same seed; a plan's loss is their sum over its components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ..quantization.filters import VAE_METHODS
from ..quantization.speed_note import SIXTEEN_BIT_TIME
from .card import Card


@dataclass(frozen=True)
class Loss:
    """How much a method is expected to change the picture, when a component of that role has it.

    Attributes:
        distance: expected LPIPS.
        error: relative error of a Linear's output (docs/quantization.md), which decides where distances and times are equal.
        evidence: where the figure comes from.
    """

    distance: float
    error: float
    evidence: str


LOSSES: Final[Mapping[str, Mapping[str, Loss]]] = {
    "transformer": {
        "none": Loss(0.0, 0.0, "nothing is quantized"),
        "int8": Loss(0.10, 0.009, "published 8-bit denoisers: LPIPS 0.04 to 0.13"),
        "fp8-weight-only": Loss(0.10, 0.027, "the same"),
        "fp8-dynamic": Loss(0.10, 0.038, "the same; 0.124 of FLUX.1-schnell with fp8 rows, 0.058 of Z-Image-Turbo"),
        "int4": Loss(0.28, 0.100, "published 4-bit denoisers: LPIPS 0.20 to 0.35"),
    },
    "encoder": {
        "none": Loss(0.0, 0.0, "nothing is quantized"),
        "int8": Loss(0.04, 0.009, "FLUX.1's text encoder in fp8: LPIPS 0.039"),
        "fp8-weight-only": Loss(0.04, 0.027, "the same"),
        "int4": Loss(0.11, 0.100, "as far from 8 bits as of denoisers; no measurement known"),
    },
    "vae": {
        "none": Loss(0.0, 0.0, "nothing is quantized"),
        "int8": Loss(
            0.01, 0.009, "a VAE of 1.3 M parameters, each weight rounded for itself: 42 dB of PSNR to itself in float32"
        ),
    },
}
TILED_LOSS: Final = 0.005
"""Tiles overlap by a quarter and are blended; what crosses a seam differs. Below every quantization."""
FRAGILE_LOSS: Final = 0.01
"""For quantizing the blocks that the authors leave in bf16 (`Family.bf16_blocks`): worth their memory before a method."""
SMALL_VAE_BYTES: Final = 1024**3
"""Below this a VAE's weights are a small part of any card; its activations, which int8 does not shrink, are the memory."""

STEP_TIMES: Final[Mapping[str, float]] = {
    "none": 1.0,
    "int8": SIXTEEN_BIT_TIME,
    "fp8-weight-only": SIXTEEN_BIT_TIME,
    "int4": SIXTEEN_BIT_TIME,
    "fp8-dynamic": 0.76,
}
"""Seconds of a step, bf16 without a compiler being 1: klein-9B on an H200 (`benchmarks/results/speed-h200.json`)."""
COMPILED_TIMES: Final[Mapping[str, float]] = {"none": 0.76, "fp8-dynamic": 0.53}
"""The same compiled; the weight-only methods were not measured so, and are not compiled."""
HALF_RATE: Final = 1.0
"""The step of fp8-dynamic where fp8 multiplies at the rate of bf16 (`Card.consumer`)."""

PLACEMENTS: Final[Mapping[str, tuple[int, str]]] = {
    "none": (0, "everything stays on the device"),
    "encode_then_free": (1, "the text encoder encodes alone and leaves; the rest stays"),
    "model": (2, "one component at a time on the device"),
    "group": (3, "one layer at a time on the device, read over the bus in every step"),
}
"""By name of the offloading, its rank by time, and what it does.

"group" comes after everything that does not stream, whatever its loss: a step that reads tens of GB over PCIe (25 GB/s at best)
takes seconds where it took a fraction of one.
"""


@dataclass(frozen=True)
class Candidate:
    """One way to run a pipeline.

    Attributes:
        methods: by role, the method.
        offload: a name of `PLACEMENTS`.
        keep_fragile: the family's `bf16_blocks` stay in bf16.
        compile_mode: of the transformer's blocks; "" for uncompiled.
    """

    methods: Mapping[str, str]
    offload: str
    keep_fragile: bool = False
    compile_mode: str = ""
    step_time: float = field(default=1.0, compare=False)

    @property
    def loss(self) -> float:
        """Expected LPIPS, tiling not counted in."""
        fragile = self.methods["transformer"] != "none" and not self.keep_fragile
        return sum(LOSSES[role][method].distance for role, method in self.methods.items()) + FRAGILE_LOSS * fragile

    @property
    def error(self) -> float:
        """Sum of the relative errors of a Linear."""
        return sum(LOSSES[role][method].error for role, method in self.methods.items())

    def rank(self, tiled: bool) -> tuple[bool, float, int, float, float]:
        """The smaller the better."""
        loss = round(self.loss + TILED_LOSS * tiled, 6)
        return (self.offload == "group", loss, PLACEMENTS[self.offload][0], self.step_time, self.error)

    def __str__(self) -> str:
        words = [f"{role} {method}" for role, method in self.methods.items()]
        return ", ".join([*words, *([f"offload {self.offload}"] if self.offload != "none" else [])])


def candidates(card: Card, vae_bytes: int, has_fragile: bool) -> list[Candidate]:
    """All that the card can do."""
    found = []
    for transformer in LOSSES["transformer"]:
        for encoder in LOSSES["encoder"]:
            if refusal(transformer, card) or refusal(encoder, card):
                continue
            for vae in VAE_METHODS if vae_bytes >= SMALL_VAE_BYTES else ("none",):
                for offload in PLACEMENTS:
                    if offload == "group" and "none" in (transformer, encoder):
                        continue  # twice the bytes over the bus in every step, and twice the host's memory
                    methods = {"transformer": transformer, "encoder": encoder, "vae": vae}
                    mode, time = _speed(transformer, offload, card)
                    kept = (True, False) if has_fragile and transformer != "none" else (True,)
                    found += [Candidate(methods, offload, keep, mode, time) for keep in kept]
    return found


def refusal(method: str, card: Card) -> str:
    """Why a card cannot run a method, or ""."""
    if method.startswith("fp8") and not card.has_fp8:
        have = "no CUDA" if card.capability is None else "capability {}.{}".format(*card.capability)
        return f"{method} needs compute capability 8.9, and {card.name} has {have}"
    return ""


def _speed(method: str, offload: str, card: Card) -> tuple[str, float]:
    """The compile mode that is worth it, and the time of a step."""
    eager = HALF_RATE if method == "fp8-dynamic" and card.consumer else STEP_TIMES[method]
    compiles = card.capability is not None and card.capability >= (8, 0) and offload != "group" and method in COMPILED_TIMES
    if not compiles:
        return "", eager
    compiled = COMPILED_TIMES["none"] if method == "fp8-dynamic" and card.consumer else COMPILED_TIMES[method]
    return "default", compiled
