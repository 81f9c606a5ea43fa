"""The record of a load: what was asked for, what was done, what was left alone and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..names import format_bytes


@dataclass(frozen=True)
class ComponentReport:
    """What happened to one component.

    Attributes:
        name: its name in the pipeline, e.g. "text_encoder".
        role: "encoder", "transformer", "vae", or None for a component that no role covers.
        class_name: its class.
        method: the method it has now; "none", or "already_quantized" if it came quantized.
        backend: how it got there: "torchao", "layerwise", "checkpoint", or None.
        granularity: granularity of an fp8 method, else None.
        quantized_layers, total_layers: counts of layers.
        skip_reasons: the layers that were left alone, with the reason of each.
        bytes_before, bytes_after: storage in the load's dtype, and as held now.
        seconds: time it took to read and quantize; 0 for a component that was passed in and not quantized.
        dtype: dtype of what is not quantized.
        note: anything the user should know, else "".
        dequantized: names of the parameters that a checkpoint file holds in fp8 and the model in `dtype`.
    """

    name: str
    role: str | None
    class_name: str
    method: str = "none"
    backend: str | None = None
    granularity: str | None = None
    quantized_layers: int = 0
    total_layers: int = 0
    skip_reasons: Mapping[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    dtype: str = ""
    note: str = ""
    dequantized: tuple[str, ...] = ()

    @property
    def skipped_layers(self) -> int:
        return self.total_layers - self.quantized_layers


@dataclass(frozen=True)
class QuantizationReport:
    """The report of a pipeline; `print` it, index it by component name, or take `to_dict()`.

    Attributes:
        components: a report per model of the pipeline, in the pipeline's order.
        device: what the pipeline was loaded for: the card's name, or "CPU".
        notes: what concerns the whole pipeline.
    """

    components: tuple[ComponentReport, ...]
    device: str = ""
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ComponentReport:
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(f"no component {name!r} in the report: it has {', '.join(c.name for c in self.components)}")

    def __iter__(self) -> Iterator[ComponentReport]:
        return iter(self.components)

    @property
    def bytes_before(self) -> int:
        return sum(component.bytes_before for component in self.components)

    @property
    def bytes_after(self) -> int:
        return sum(component.bytes_after for component in self.components)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        return {
            "device": self.device,
            "components": {
                component.name: {**asdict(component), "skipped_layers": component.skipped_layers} for component in self.components
            },
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        header = ("component", "role", "method", "backend", "layers", "before", "held", "s")
        rows = [header, *map(_row, self.components)]
        total = ("total", "", "", "", "", format_bytes(self.bytes_before), format_bytes(self.bytes_after), "")
        rows.append(total)
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines += [line for component in self.components for line in _details(component)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _row(component: ComponentReport) -> tuple[str, ...]:
    method = f"{component.method} {component.granularity}" if component.granularity else component.method
    return (
        component.name,
        component.role or "-",
        method,
        component.backend or "-",
        f"{component.quantized_layers}/{component.total_layers}" if component.total_layers else "-",
        format_bytes(component.bytes_before),
        format_bytes(component.bytes_after),
        f"{component.seconds:.1f}",
    )


def _details(component: ComponentReport) -> list[str]:
    """A line for the note, and, where something was quantized, one for every reason with a few of its layers."""
    lines = [f"{component.name}: {component.note}"] if component.note else []
    if component.dequantized:
        shown = ", ".join(component.dequantized[:3]) + (", ..." if len(component.dequantized) > 3 else "")
        lines.append(f"{component.name}: {len(component.dequantized)} parameters dequantized from the file's fp8: {shown}")
    if component.quantized_layers == 0:
        return lines
    grouped: dict[str, list[str]] = {}
    for layer, reason in component.skip_reasons.items():
        grouped.setdefault(reason, []).append(layer)
    for reason, layers in grouped.items():
        shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
        noun = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
        lines.append(f"{component.name}: {noun} not quantized, {reason}: {shown}")
    return lines
