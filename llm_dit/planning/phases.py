"""What a pipeline holds while it loads, encodes, denoises and decodes, on the device and on the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from ..decoding import Cut
from ..forwards import Size
from .candidates import Candidate
from .constants import constants
from .sizes import PipelineSizes

NAMES: Final = ("load", "encode", "denoise", "decode")


@dataclass(frozen=True)
class Phase:
    """The peak of one phase, in bytes.

    Attributes:
        name: one of `NAMES`.
        weights: weights on the device.
        activations: activations, workspaces and buffers on the device.
        context: what CUDA and the allocator take beside.
        host: anonymous host memory above what the process held before the load.
        before: what is left of the phase before where diffusers moves the weights: it does so once this one has begun.
    """

    name: str
    weights: int
    activations: int
    context: int
    host: int
    before: int = 0

    @property
    def device(self) -> int:
        """All of the device's memory that is taken."""
        return self.weights + self.activations + self.context

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` is promised to stay below."""
        return max(self.weights + self.activations, self.before)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**asdict(self), "device": self.device}


def timeline(sizes: PipelineSizes, candidate: Candidate, size: Size, cut: Cut) -> tuple[Phase, ...]:
    """The four phases of a candidate."""
    return _Timeline(sizes, candidate, size, cut).phases()


class _Timeline:
    def __init__(self, sizes: PipelineSizes, candidate: Candidate, size: Size, cut: Cut) -> None:
        self.sizes, self.candidate, self.size, self.cut = sizes, candidate, size, cut
        self.methods = {name: part.method_for(candidate.methods[part.role]) for name, part in sizes.components.items()}
        self.held = {
            name: part.bytes_for(candidate.methods[part.role], candidate.keep_fragile) for name, part in sizes.components.items()
        }

    def phases(self) -> tuple[Phase, ...]:
        make = {"none": self._resident, "encode_then_free": self._freed, "model": self._swapped, "group": self._streamed}
        measured, everything = constants(), sum(self.held.values())
        offloaded = self.candidate.offload != "none"
        loading = (0 if offloaded else everything, measured.load.device_bytes)
        found = [
            ("load", *loading),
            *((name, *parts) for name, parts in zip(NAMES[1:], make[self.candidate.offload](), strict=True)),
        ]
        kept = self.size.batch * self.sizes.family.forwards.kept
        host = measured.load.host_bytes + (everything if offloaded else 0)
        phases: list[Phase] = []
        for name, weights, taken in found:
            more = taken + kept * (name != "load")
            swaps = name == "denoise" and self.candidate.offload == "model"
            before = phases[-1].weights + kept + measured.phases["encode"].extra_bytes if swaps else 0
            context = measured.context_bytes + int(measured.slack * (weights + more))
            phases.append(Phase(name, weights, more, context, host, before))
        return tuple(phases)

    def _resident(self) -> list[tuple[int, int]]:
        everything = sum(self.held.values())
        return [(everything, max(self._encoding().values())), (everything, self._step()), (everything, self._decode())]

    def _freed(self) -> list[tuple[int, int]]:
        """The VAE stays beside the text encoder, so that the pipeline knows where it runs; connectors come with the rest."""
        encoding = self._encoding()
        first = [name for name in encoding if name in self.sizes.encoders or name == "vae"]
        rest = sum(size for name, size in self.held.items() if name not in self.sizes.encoders)
        later = [taken for name, taken in encoding.items() if name not in first]
        alone = self._sum(self.sizes.encoders) + self.held.get("vae", 0)
        both = [(alone, max(encoding[name] for name in first)), *((rest, taken) for taken in later)]
        return [max(both, key=sum), (rest, self._step()), (rest, self._decode())]

    def _swapped(self) -> list[tuple[int, int]]:
        """diffusers moves a component away when the next of its order comes; references bring the VAE before its turn."""
        vae = self.held.get("vae", 0) if self.size.references else 0
        encoding = max(((self.held[name] + vae, taken) for name, taken in self._encoding().items() if name != "vae"), key=sum)
        decoders = [self.held[name] for name, part in self.sizes.components.items() if part.role == "vae"]
        return [encoding, (self.held["transformer"] + vae, self._step()), (max(decoders), self._decode())]

    def _streamed(self) -> list[tuple[int, int]]:
        """Of each component the largest layer."""
        largest = {name: min(part.largest, self.held[name]) for name, part in self.sizes.components.items()}
        encoding = max(((largest[name], taken) for name, taken in self._encoding().items()), key=sum)
        return [encoding, (largest["transformer"], self._step()), (largest["vae"], self._decode())]

    def _encoding(self) -> dict[str, int]:
        """Bytes of activations by component: of prompts, one after the other, and of reference images."""
        taken = {
            name: self.sizes.activations(name, "encode", replace(self.size, references=0), self.methods[name])
            for name in self.sizes.family.forwards.encoders
            if name in self.sizes.components
        }
        if self.size.references:
            taken["vae"] = self.sizes.activations("vae", "encode", self.size)
        return taken

    def _step(self) -> int:
        size = replace(self.size, batch=self.size.batch * self.sizes.family.forwards.guided_batch)
        return self.sizes.activations("transformer", "denoise", size, self.methods["transformer"])

    def _decode(self) -> int:
        return self.sizes.activations("vae", "decode", replace(self.size, references=0), cut=self.cut)

    def _sum(self, names: Iterable[str]) -> int:
        return sum(self.held[name] for name in names)
