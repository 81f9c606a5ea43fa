"""What a report says beside its rows: where a request and what was saved differ, skip patterns without effect, slow methods."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .loader import saved_method
from .quantization import METHODS, ComponentReport, detect_hardware
from .quantization.speed_note import speed_note


def compared(report: ComponentReport, wanted: str | None, model: nn.Module) -> ComponentReport:
    """Says, in the report and as a warning, where a saved quantization stands against the method that is asked for, if any is."""
    if wanted is None or saved_method(model) == wanted:
        return report
    note = f"{report.note}, although {wanted} was asked for: load the bf16 weights to change the method"
    warnings.warn(f"{report.name}: {note}", stacklevel=5)
    return replace(report, note=note)


def skip_notes(skip: Sequence[str], reports: Sequence[ComponentReport], as_saved: Sequence[str]) -> list[str]:
    """Of patterns that kept no layer from a method, why not.

    Args:
        as_saved: the components that were saved quantized, which patterns do not reach.
    """
    idle = [p for p in skip if not any(f"skip pattern {p!r}" in report.skip_reasons.values() for report in reports)]
    if not idle:
        return []
    listed = ", ".join(idle)
    if as_saved:
        return [f"skip patterns without effect: {listed}; {', '.join(as_saved)} stay{'' if as_saved[1:] else 's'} as saved"]
    if any(report.quantized_layers for report in reports):
        return [f"skip patterns that matched no layer: {listed}"]
    return [f"skip patterns without effect, as nothing is quantized: {listed}"]


def speed_notes(reports: Sequence[ComponentReport]) -> list[str]:
    """Of every transformer that is expected to be slower than in bf16, what would be faster."""
    found = []
    for report in reports:
        if report.role == "transformer" and report.method in METHODS:
            note = speed_note(METHODS[report.method], report.granularity, report.backend, detect_hardware())
            found += [f"{report.name}: {note}"] if note else []
    return found
