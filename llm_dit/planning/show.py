"""Plans as people read them: a table with a bar for each phase, a matrix of budgets, a page of the docs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..decoding import WHOLE
from ..names import format_bytes
from .card import format_gb
from .plan import Plan

_WIDTH: Final = 48
_SHORT: Final = {"none": "bf16", "as saved": "saved"}
_OFFLOADS: Final = {"encode_then_free": "encode, then free", "model": "swapped", "group": "streamed"}
COLUMNS: Final = ("model", "budget", "transformer", "encoder", "VAE", "offload", "decode", "compiled", "peak", "host", "loss")


def shown(plan: Plan) -> RenderableType:
    """One plan: components, phases, and the reasons."""
    parts = Table("component", "role", "method", "backend", "granularity", "compiled", "weights", title=str(plan.size))
    for part in plan.components:
        cells = (part.method, part.backend or "-", part.granularity or "-", part.compile_mode or "-", format_bytes(part.weights))
        parts.add_row(part.name, part.role, *cells)
    verdict = "fits" if plan.fits else f"does not fit: {format_bytes(plan.short_by)} too much at the least; this is the smallest"
    head = Text(f"{plan.source} ({plan.pipeline_class}) in {format_gb(plan.budget)} on {plan.card.name}: {verdict}", style="bold")
    return Group(head, parts, _bars(plan), *_lines(plan))


def _bars(plan: Plan) -> Table:
    """Each phase as a bar whose end is the budget, or the peak where that is more."""
    table = Table("phase", f"{format_bytes(plan.budget)} of the device", "takes", "weights", "activations", "host")
    full = max(plan.budget, plan.shown.peak.device)
    for phase in plan.shown.phases:
        weights, more = (round(_WIDTH * part / full) for part in (phase.weights, phase.activations + phase.context))
        bar = Text("█" * weights, style="blue") + Text("▓" * more, style="cyan")
        bar += Text("·" * max(round(_WIDTH * plan.budget / full) - weights - more, 0), style="dim")
        sizes = (phase.device, phase.weights, phase.activations, phase.host)
        table.add_row(phase.name, bar, *map(format_bytes, sizes))
    return table


def _lines(plan: Plan) -> list[Text]:
    candidate = plan.shown.candidate
    loss = f"expected LPIPS to bf16: {candidate.loss:.2f}"
    rows = [("chosen", (loss, *plan.reasons)), ("rejected", plan.rejected)]
    rows.append(("a larger budget" if plan.fits else "what would", plan.would))
    return [Text(f"{title}: {line}") for title, lines in rows for line in lines]


def row(plan: Plan) -> tuple[str, ...]:
    """One line of the matrix."""
    if not plan.fits:
        missing = f"does not fit, {format_bytes(plan.short_by)} too much"
        return (plan.source, format_gb(plan.budget), missing, *[""] * (len(COLUMNS) - 3))
    candidate, shown = plan.shown.candidate, plan.shown
    kept = " *" if plan.skip else ""
    methods = [_SHORT.get(candidate.methods[role], candidate.methods[role]) for role in ("transformer", "encoder", "vae")]
    return (
        plan.source,
        format_gb(plan.budget),
        methods[0] + kept,
        *methods[1:],
        _OFFLOADS.get(candidate.offload, "-"),
        "-" if shown.cut == WHOLE else str(shown.cut).removeprefix("in "),
        candidate.compile_mode or "-",
        format_bytes(shown.peak.device),
        format_bytes(max(phase.host for phase in shown.phases)),
        f"{candidate.loss:.2f}",
    )


def matrix(plans: Sequence[Plan]) -> Table:
    """Several plans, one a line."""
    table = Table(*COLUMNS)
    for plan in plans:
        table.add_row(*row(plan))
    return table


def page(plans: Sequence[Plan], command: str) -> str:
    """The matrix as a page of the docs."""
    lines = [
        "# Which plan for which card",
        "",
        "Made by",
        "",
        "```bash",
        command,
        "```",
        "",
        f"For `--card {plans[0].card.name}`, with the sizes that each family's script makes: "
        + "; ".join(dict.fromkeys(f"{plan.source} {plan.size}" for plan in plans))
        + ". A GB is 10^9 bytes, as on the box of a card; CUDA's own share is counted in. `peak` is the most that the device is "
        "expected to hold, `host` the memory of the process beside, `loss` the expected LPIPS to the picture of the bf16 model. "
        "`*`: the blocks that the authors leave in bf16 stay so. How a plan is made: [planning.md](planning.md).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
        *(f"| {' | '.join(row(plan))} |" for plan in plans),
    ]
    return "\n".join(lines) + "\n"
