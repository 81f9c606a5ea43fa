"""From the points of `llm-dit bench calibrate` to the constants of the planner: two thirds of them fit, a third tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

from torch import nn
from tqdm.auto import tqdm

from ..decoding import WHOLE, Cut
from ..planning.activations import PHASES, activation_bytes, make_on_meta
from ..planning.constants import PATH, Constants, Correction, constants
from ..writing import write_text
from .calibrate import CONTEXT, Case, components_of
from .results import Row, read_rows
from .timing import GIB

MARGIN_BYTES: Final = 48 * 1024**2
"""Added to what the points that are fitted need, for those that are not."""
_FACTORS: Final = tuple(1 + step / 100 for step in range(101))


@dataclass(frozen=True)
class Point:
    """A measured point of a role and a class of models with what is counted for it, in bytes."""

    case: Case
    role: str
    class_name: str
    counted: int
    measured: int

    def allowed(self) -> float:
        """By how much an estimate may exceed what was measured."""
        return max(GIB, 0.1 * self.measured)


def points(rows: Sequence[Row]) -> list[Point]:
    """The points of a device, in the order of their names; failed ones and those without a GPU are left out."""
    found = []
    for row in tqdm(rows, desc="Counting", unit="point", disable=len(rows) < 20):
        case = Case(**{field.name: row[field.name] for field in fields(Case)})
        if case.component != CONTEXT and row.get("allocated_bytes") is not None:
            _, role, model = _model(case.geometry, case.component)
            found.append(Point(case, role, type(model).__name__, counted(case), row["allocated_bytes"]))
    return sorted(found, key=lambda point: repr(point.case))


def split(found: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Those that are fitted, and every third, which tests."""
    return [p for place, p in enumerate(found) if place % 3 != 2], [p for place, p in enumerate(found) if place % 3 == 2]


def counted(case: Case) -> int:
    """Bytes of activations that are counted for a case."""
    family, role, model = _model(case.geometry, case.component)
    cut = Cut(tile=case.tile) if case.tile else WHOLE
    return activation_bytes(model, case.component, case.phase, role, family.forwards, case.size, cut)[case.method]


@cache
def _model(geometry: str, component: str) -> tuple[Any, str, nn.Module]:
    family, makers = components_of(geometry)
    return family, str(family.role(component)), make_on_meta(makers[component])


def fit(path: Path) -> Constants:
    """Writes the constants that the points of a result file give.

    Raises:
        ValueError: if the file holds no point that was measured on a GPU.
    """
    rows = read_rows(path)
    context = [row["context_bytes"] for row in rows if row.get("context_bytes")] or [constants().context_bytes]
    fitted, _ = split(points(rows))
    if {point.case.phase for point in fitted} != set(PHASES):
        raise ValueError(f"{str(path)!r} does not hold the points of a GPU that a fit needs: run bench calibrate -o {path} there")
    by_vaes = [point for point in fitted if (point.case.phase, point.role) == ("encode", "vae")]
    others = [point for point in fitted if point not in by_vaes]
    phases = {phase: correction([point for point in others if point.case.phase == phase]) for phase in PHASES[:2]}
    decodes = [point for point in fitted if point.case.phase == "decode"]
    kinds = sorted({point.class_name for point in decodes})
    decoders = {kind: correction([point for point in decodes if point.class_name == kind]) for kind in kinds}
    phases["decode"] = max(decoders.values(), key=lambda one: one.factor)
    # Few encodes are measured, and they are convolutions as well: no less than the decode that takes most.
    vae_encode = max([phases["decode"], *([correction(by_vaes)] if by_vaes else [])], key=lambda one: one.factor)
    found = Constants(
        context_bytes=context[0],
        phases=phases,
        decoders=decoders,
        vae_encode=vae_encode,
        load=constants().load,
        slack=constants().slack,
    )
    write_text(PATH, json.dumps(found.model_dump(), indent=2) + "\n")
    return found


def correction(found: Sequence[Point]) -> Correction:
    """The factor, from 1 to 2, and the bytes that cover every point, and exceed the one that they exceed most by the least."""

    def excess(factor: float) -> tuple[float, int]:
        extra = max(0, int(max(point.measured - factor * point.counted for point in found))) + MARGIN_BYTES
        return max((factor * point.counted + extra - point.measured) / point.allowed() for point in found), extra

    factor = min(_FACTORS, key=excess)
    return Correction(factor=factor, extra_bytes=excess(factor)[1])
