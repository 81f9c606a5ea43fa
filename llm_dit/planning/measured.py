"""What a planned pipeline really takes, phase by phase, beside what the plan promised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..names import format_bytes
from .phases import NAMES
from .plan import Plan


class Recorder:
    """Notes the peak of the device's memory in each phase of a pipeline.

    A phase begins when a component of it runs: encoders (and the VAE's encoder) "encode", the transformer "denoise", the VAE's
    decoder "decode". Without a GPU there are no peaks, only what is held.

    Attributes:
        plan: what was promised.
        allocated, reserved: by phase, the most bytes that were allocated, and that the allocator had taken.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self._phase = NAMES[0]

    def watch(self, models: Mapping[str, nn.Module]) -> None:
        """Watches the models of a pipeline."""
        roles = {part.name: part.role for part in self.plan.components}
        for name, model in models.items():
            if roles.get(name) == "encoder":
                self._at(model, "encode")
            elif name == "transformer":
                self._at(model, "denoise")
            elif name == "vae":
                for part, phase in (("encoder", "encode"), ("decoder", "decode")):
                    if isinstance(getattr(model, part, None), nn.Module):
                        self._at(getattr(model, part), phase)

    def _at(self, module: nn.Module, phase: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.begin(phase))

    def begin(self, phase: str) -> None:
        """Ends the phase that was and begins another; the same one goes on."""
        if phase == self._phase or torch.compiler.is_compiling():
            return
        self.note()
        self._phase = phase

    def note(self) -> None:
        """Takes the peak since the last time into the phase that is."""
        if self.device.type != "cuda":
            return
        for peaks, read in ((self.allocated, torch.cuda.max_memory_allocated), (self.reserved, torch.cuda.max_memory_reserved)):
            peaks[self._phase] = max(peaks.get(self._phase, 0), read(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)

    def lines(self, held: Mapping[str, int]) -> list[str]:
        """The comparison, a line each.

        Args:
            held: by component, the bytes of its weights.
        """
        self.note()
        found = [f"the plan: {self.plan}"]
        for phase in self.plan.shown.phases:
            if phase.name in self.allocated:
                allocated, reserved = self.allocated[phase.name], self.reserved[phase.name]
                taken = f"measured {format_bytes(allocated)} (the allocator took {format_bytes(reserved)})"
                found.append(f"{phase.name}: planned {format_bytes(phase.allocated)}, {taken}")
        for part in self.plan.components:
            if part.name in held:
                planned = format_bytes(part.weights)
                found.append(f"{part.name}: planned {planned} of weights, held {format_bytes(held[part.name])}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """By phase, bytes promised, allocated and reserved; None without a GPU."""
        self.note()
        return {
            phase.name: {
                "promised": phase.allocated,
                "promised_device": phase.device,
                "allocated": self.allocated.get(phase.name),
                "reserved": self.reserved.get(phase.name),
            }
            for phase in self.plan.shown.phases
        }
