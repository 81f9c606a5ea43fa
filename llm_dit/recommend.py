"""Which method for which role on the card at hand, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .estimate import PipelineEstimate
from .names import format_bytes
from .planning.candidates import SMALL_VAE_BYTES
from .quantization import Hardware, get_method

WEIGHTS_SHARE = 0.75
"""Share of the card's memory that weights may take; the rest is for activations and the allocator."""


@dataclass(frozen=True)
class Recommendation:
    """A method for each role, but for those that were saved quantized, and why."""

    methods: Mapping[str, str]
    reasons: tuple[str, ...]


def recommend(hardware: Hardware, estimate: PipelineEstimate | None = None) -> Recommendation:
    """Recommends by the card's abilities and, where the pipeline's sizes are known, by what fits it.

    Compression goes up only as far as needed: the transformer in the card's fastest 8-bit method first, then the
    encoder in int8, then the transformer and at last the encoder in int4.
    """
    reasons = [_hardware_reason(hardware)]
    methods = {"transformer": hardware.recommended_method, "encoder": "none", "vae": "none"}
    if estimate is None:
        reasons.append("give a model to choose the encoder and the vae by what fits")
        return Recommendation(methods, tuple(reasons))
    saved = _saved_roles(estimate)
    for role in saved:
        del methods[role]
        reasons.append(f"{role}: saved quantized, and loaded as it was saved: ask for nothing")
    vae = sum(c.bytes_for("none") for c in estimate.components if c.role == "vae")
    if vae >= SMALL_VAE_BYTES and "vae" not in saved:
        methods["vae"] = "int8"
        reasons.append(f"vae int8: its weights take {format_bytes(vae)} in bf16")
    if not hardware.memory_bytes:
        reasons.append("no card to fit into, so the encoder stays in bf16")
        return Recommendation(methods, tuple(reasons))
    room = int(hardware.memory_bytes * WEIGHTS_SHARE)
    for step in ({}, {"encoder": "int8"}, {"transformer": "int4"}, {"encoder": "int4"}):
        if step.keys() & saved:
            continue
        methods |= step
        held = total_bytes(estimate, methods)
        fits = held <= room
        verdict = "fits" if fits else "does not fit"
        reasons.append(
            f"transformer {methods.get('transformer', 'as saved')}, encoder {methods.get('encoder', 'as saved')}: "
            f"{format_bytes(held)} of weights, {verdict} into {format_bytes(room)} ({WEIGHTS_SHARE:.0%} of the card)"
        )
        if fits:
            return Recommendation(methods, tuple(reasons))
    reasons.append("the weights do not fit at once: use enable_model_cpu_offload(), which holds one component at a time")
    return Recommendation(methods, tuple(reasons))


def _saved_roles(estimate: PipelineEstimate) -> list[str]:
    """The roles of which every component was saved quantized."""
    roles = dict.fromkeys(component.role for component in estimate.components)
    return [role for role in roles if all(c.saved for c in estimate.components if c.role == role)]


def total_bytes(estimate: PipelineEstimate, methods: Mapping[str, str]) -> int:
    """Weight bytes of the pipeline under a method per role."""
    total = 0
    for component in estimate.components:
        method = get_method(methods.get(component.role, "none")).name
        total += component.bytes_for(method if method in component.methods else "none")
    return total


def _hardware_reason(hardware: Hardware) -> str:
    if hardware.capability is None:
        return "no CUDA device: int8 runs everywhere and keeps the most precision of the 8-bit methods"
    major, minor = hardware.capability
    if hardware.has_fp8:
        return f"{hardware.name} (capability {major}.{minor}) has fp8 tensor cores: fp8-dynamic multiplies on them"
    return f"{hardware.name} (capability {major}.{minor}) has no fp8 tensor cores: int8 weights, 16-bit compute"
