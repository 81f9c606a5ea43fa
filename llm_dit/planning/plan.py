"""Chooses how to run a pipeline in a budget of device memory, and says why."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import diffusers

from ..decoding import WHOLE, Cut
from ..forwards import Size
from ..names import format_bytes
from .candidates import LOSSES, PLACEMENTS, SMALL_VAE_BYTES, Candidate, candidates, refusal
from .card import LADDER, Card, format_gb
from .phases import Phase, timeline
from .sizes import AS_SAVED, PipelineSizes, pipeline_sizes

MOST_SIDE: Final = 16384
MOST_FRAMES: Final = 4097
MOST_BATCH: Final = 256
_SHOWN: Final = 6
"""Rejected candidates that are told; there are hundreds."""


@dataclass(frozen=True)
class Chosen:
    """A candidate with what it takes.

    Attributes:
        candidate: methods, placement and compile mode.
        cut: how the VAE decodes.
        phases: peaks of load, encode, denoise and decode.
    """

    candidate: Candidate
    cut: Cut
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that takes most of the device."""
        return max(self.phases, key=lambda phase: phase.device)


@dataclass(frozen=True)
class ComponentPlan:
    """What is done with one component.

    Attributes:
        name, role: its name in the pipeline, and its role.
        method: quantization method, or "as saved".
        backend: "torchao"; "" where nothing is quantized.
        granularity: of an fp8 method, else "".
        compile_mode: "" for uncompiled.
        weights: bytes that it holds.
    """

    name: str
    role: str
    method: str
    backend: str
    granularity: str
    compile_mode: str
    weights: int


@dataclass(frozen=True)
class Plan:
    """How to run a pipeline in a budget, or by how much it does not fit.

    Attributes:
        source, pipeline_class: what is planned.
        card, budget, size: for what; the budget in bytes.
        chosen: None if nothing fits.
        components: with what is chosen, or with what is smallest.
        smallest: the candidate with the smallest peak.
        reasons: why it was chosen.
        rejected: what would lose less or be faster, and by how much it does not fit, or why the card cannot do it.
        would: if nothing fits, what would; otherwise what the next larger budget buys.
        skip: patterns of the layers that stay in bf16.
        encoder_layers: "read" where parts of the text encoder are left unread.
    """

    source: str
    pipeline_class: str
    card: Card
    budget: int
    size: Size
    chosen: Chosen | None
    components: tuple[ComponentPlan, ...]
    smallest: Chosen
    reasons: tuple[str, ...]
    rejected: tuple[str, ...]
    would: tuple[str, ...]
    skip: tuple[str, ...]
    encoder_layers: str

    @property
    def fits(self) -> bool:
        return self.chosen is not None

    @property
    def shown(self) -> Chosen:
        """What is chosen, or else the smallest."""
        return self.chosen or self.smallest

    @property
    def short_by(self) -> int:
        """Bytes that are missing; 0 if it fits."""
        return max(0, self.smallest.peak.device - self.budget) if self.chosen is None else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        shown = self.shown
        return {
            "source": self.source,
            "pipeline_class": self.pipeline_class,
            "card": self.card.name,
            "budget_bytes": self.budget,
            "size": {**vars(self.size)},
            "fits": self.fits,
            "short_by_bytes": self.short_by,
            "components": {part.name: vars(part) for part in self.components},
            "offload": shown.candidate.offload,
            "compile_mode": shown.candidate.compile_mode,
            "decode": str(shown.cut),
            "encoder_layers": self.encoder_layers,
            "skip": list(self.skip),
            "expected_loss": shown.candidate.loss,
            "phases": {phase.name: phase.to_dict() for phase in shown.phases},
            "reasons": list(self.reasons),
            "rejected": list(self.rejected),
            "would": list(self.would),
        }

    def __str__(self) -> str:
        words = [f"{part.name} {part.method}" for part in self.components if part.role != "vae" or part.method != "none"]
        words += [f"offload {self.shown.candidate.offload}"] if self.shown.candidate.offload != "none" else []
        words += [f"decoded {self.shown.cut}"] if self.shown.cut != WHOLE else []
        fits = "fits" if self.fits else f"does not fit: {format_bytes(self.short_by)} are missing even with"
        return f"{self.source} in {format_gb(self.budget)} {fits} {', '.join(words)}"


def make_plan(
    source: str,
    budget: int,
    card: Card,
    size: Size | None = None,
    fixed: Mapping[str, str] | None = None,
    encoder_layers: str = "read",
    **hub: Any,
) -> Plan:
    """The plan of a pipeline in `budget` bytes.

    Args:
        source: a folder, a repository id, or an offline name, as in `estimate_pipeline`.
        budget: bytes of device memory, CUDA's own included.
        card: decides which methods there are, and how fast they are.
        size: what is generated; the family's default if None.
        fixed: by role, the methods that are chosen already.
        encoder_layers: "read" to leave parts of the text encoder unread that no call uses, or "all".
        **hub: where to find a repository, e.g. `revision`.

    Raises:
        ValueError: for an unknown source, or a size that the pipeline cannot make.
    """
    if budget <= 0:
        raise ValueError(f"a budget must be more than 0 bytes, not {budget}")
    sizes = pipeline_sizes(source, encoder_layers, **hub)
    return _plan(sizes, budget, card, checked_size(sizes, size or default_size(sizes)), fixed or {})


def default_size(sizes: PipelineSizes) -> Size:
    """What the family's script makes."""
    call = sizes.family.generation.call
    return Size(call["height"], call["width"], call.get("num_frames", 1))


def checked_size(sizes: PipelineSizes, size: Size) -> Size:
    """The size; raises ValueError, with the nearest that can be made, unless the pipeline can make it."""
    forwards, title = sizes.family.forwards, sizes.family.title
    step = 2 * forwards.pixels_per_token if forwards.frames_step == 0 else forwards.pixels_per_token
    for name, value in (("height", size.height), ("width", size.width)):
        if not step <= value <= MOST_SIDE:
            raise ValueError(f"{title} is planned for a {name} from {step} to {MOST_SIDE}, not {value}")
    forwards.check(title, size.height, size.width, size.frames)
    if not 1 <= size.batch <= MOST_BATCH:
        raise ValueError(f"the batch must be from 1 to {MOST_BATCH}, not {size.batch}")
    if not 0 <= size.references <= forwards.most_references:
        most = f"takes at most {forwards.most_references}" if forwards.most_references else "is planned without"
        raise ValueError(f"{title} {most} reference images, not {size.references}")
    if size.references and not takes_pictures(sizes.pipeline_class):
        raise ValueError(f"{sizes.pipeline_class} takes no reference images: plan a pipeline that edits")
    if not forwards.frames_step and size.frames != 1:
        raise ValueError(f"{title} makes pictures, and no {size.frames} frames: leave frames out")
    if size.frames > MOST_FRAMES:
        raise ValueError(f"{title} is planned for at most {MOST_FRAMES} frames, not {size.frames}")
    return size


def takes_pictures(pipeline_class: str) -> bool:
    """True if a call of that diffusers class takes images along with the prompt."""
    return "image" in inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters


def _plan(sizes: PipelineSizes, budget: int, card: Card, size: Size, fixed: Mapping[str, str]) -> Plan:
    fixed = {**sizes.saved_methods(), **fixed}
    ranked = _ranked(sizes, card, size, fixed)
    if not ranked:
        told = ", ".join(f"{role} {method}" for role, method in fixed.items())
        raise ValueError(f"{told} cannot be planned on {card.name}: leave the method to quantization='auto'")
    place = next((place for place, one in enumerate(ranked) if one.peak.device <= budget), None)
    smallest = min(ranked, key=lambda one: one.peak.device)
    chosen = ranked[place] if place is not None else None
    shown = chosen or smallest
    kept = shown.candidate.keep_fragile and shown.candidate.methods["transformer"] != "none"
    skip = sizes.skip if kept else ()
    left_out = [part for part in sizes.components.values() if part.left_out]
    more = partial(_what_would, sizes, card, size, fixed, budget, smallest)
    would = more() if place is None else _next_budget(ranked, place, budget)
    refused = [reason for method in LOSSES["transformer"] if (reason := refusal(method, card))]
    return Plan(
        sizes.source,
        sizes.pipeline_class,
        card,
        budget,
        size,
        chosen,
        tuple(_components(sizes, shown.candidate)),
        smallest,
        tuple(_reasons(sizes, shown, card, skip)) if chosen else (),
        (*refused, *_rejected(ranked[:place], budget)),
        tuple(would),
        skip,
        "read" if left_out else "all",
    )


def _ranked(sizes: PipelineSizes, card: Card, size: Size, fixed: Mapping[str, str]) -> list[Chosen]:
    """Every candidate with every way to decode, the best first; of those that decode alike the first is enough."""
    vae = max((part.weights.bytes_for("none") for part in sizes.components.values() if part.role == "vae"), default=0)
    if fixed.get("vae") == "int8":
        vae = max(vae, SMALL_VAE_BYTES)  # it is so already, or asked for, however little it saves
    found = [
        (candidate.rank(cut != WHOLE), place, Chosen(candidate, cut, timeline(sizes, candidate, size, cut)))
        for candidate in candidates(card, vae, bool(sizes.skip))
        if fixed.items() <= candidate.methods.items()
        for place, cut in enumerate(sizes.cuts(size))
    ]
    return [one for _, _, one in sorted(found, key=lambda row: row[:2])]


def _components(sizes: PipelineSizes, candidate: Candidate) -> Iterator[ComponentPlan]:
    for part in sizes.components.values():
        method = part.method_for(candidate.methods[part.role])
        quantized = method not in ("none", AS_SAVED)
        yield ComponentPlan(
            part.name,
            part.role,
            method,
            "torchao" if quantized else "",
            "per-row" if method.startswith("fp8") else "",
            candidate.compile_mode if part.name == "transformer" else "",
            part.bytes_for(candidate.methods[part.role], candidate.keep_fragile),
        )


def _reasons(sizes: PipelineSizes, chosen: Chosen, card: Card, skip: Sequence[str]) -> Iterator[str]:
    candidate = chosen.candidate
    for role in ("transformer", "encoder", "vae"):
        method = candidate.methods[role]
        if method != "none" or role != "vae":
            loss = LOSSES[role][method]
            yield f"{role} {method}: expected LPIPS {loss.distance:.2f} ({loss.evidence})"
    if candidate.methods["transformer"] == "fp8-dynamic" and card.consumer:
        yield "fp8 multiplies at half rate on this class of card, which is the rate of bf16: it saves memory and little time"
    if skip:
        yield f"{', '.join(skip)} stay in bf16, as in the authors' fp8 files"
    yield f"offload {candidate.offload}: {PLACEMENTS[candidate.offload][1]}"
    if candidate.compile_mode:
        yield f"compiled ({candidate.compile_mode}): {candidate.step_time:.2f} of the time of a bf16 step without a compiler"
    if chosen.cut != WHOLE:
        yield f"decoded {chosen.cut}: the whole picture at once would not fit"
    for part in sizes.components.values():
        if part.left_out:
            yield f"{part.name}: {', '.join(part.left_out)} left unread, because nothing reads it; upsampling prompts would"


def _rejected(better: Sequence[Chosen], budget: int) -> Iterator[str]:
    """Of what ranks before, each set of methods once, at its smallest."""
    seen: dict[str, Chosen] = {}
    for one in better:
        key = str(one.candidate)
        if key not in seen or one.peak.device < seen[key].peak.device:
            seen[key] = one
    rows = list(seen.items())
    for key, one in rows[:_SHOWN]:
        over = format_bytes(one.peak.device - budget)
        yield f"{key}: {one.peak.name} takes {format_bytes(one.peak.device)}, {over} too much"
    if len(rows) > _SHOWN:
        yield f"and {len(rows) - _SHOWN} more that rank before it"


def _next_budget(ranked: Sequence[Chosen], place: int, budget: int) -> Iterator[str]:
    """The next budget that changes the choice, and to what."""
    for larger in (size for size in LADDER if size > budget):
        better = next((one for one in ranked[:place] if one.peak.device <= larger), None)
        if better is not None:
            cut = f", decoded {better.cut}" if better.cut != WHOLE else ""
            yield f"{format_gb(larger)} would buy {better.candidate}{cut}"
            return
    if place == 0:
        yield "nothing ranks before it: a larger budget buys nothing"


def _what_would(
    sizes: PipelineSizes, card: Card, size: Size, fixed: Mapping[str, str], budget: int, smallest: Chosen
) -> Iterator[str]:
    """A larger budget, and a smaller size, that would fit."""
    yield f"{format_gb(-(-smallest.peak.device // 10**8) * 10**8)} would be enough, with {smallest.candidate}"
    for smaller in _smaller(sizes, size):
        one = min(_ranked(sizes, card, smaller, fixed), key=lambda one: one.peak.device)
        if one.peak.device <= budget:
            yield f"{smaller} would fit, with {one.candidate}"
            return
    yield "no smaller picture or clip fits in the budget"


def _smaller(sizes: PipelineSizes, size: Size) -> Iterator[Size]:
    """Fewer at once, fewer frames, fewer pixels."""
    step = sizes.family.forwards.pixels_per_token
    if size.batch > 1 or size.references:
        size = replace(size, batch=1, references=0)
        yield size
    for share in (0.75, 0.5, 0.25):
        height, width = (max(2 * step, int(side * share) // step * step) for side in (size.height, size.width))
        every = sizes.family.forwards.frames_step or 1
        yield replace(
            size, height=height, width=width, frames=max(int(size.frames * share) // every * every + 1, 1) if every > 1 else 1
        )


def plan_keywords(plan: Plan) -> Mapping[str, Any]:
    """The keyword arguments of `from_pretrained` that load what is planned; empty-handed for what does not fit."""
    wanted = {part.name: part.method for part in plan.components if part.method != AS_SAVED}
    keywords: dict[str, Any] = {"quantization": wanted, "encoder_layers": plan.encoder_layers}
    if plan.skip:
        keywords["quantization_skip"] = plan.skip
    if plan.shown.candidate.compile_mode:
        keywords |= {"compile": True, "compile_mode": plan.shown.candidate.compile_mode}
    return keywords
