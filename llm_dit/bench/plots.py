"""Plots of `bench speed`: speed against memory and against error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .results import Row

_COLORS: Final = {"llm-dit": "#2a7f62", "torchao": "#c2643b", "diffusers": "#5b6fa8", "sdnq": "#8d6a9f"}
_MARKERS: Final = {"eager": "o", "compile": "s", "graph": "^", "eager-graph": "v"}
_CLOSE: Final = 0.04
"""Of the width and the height of a panel: what lies closer shares a label."""
_PANELS: Final = (("weights_gib", "weights, GiB"), ("relerr", "relative error of the output"))


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draws a line of panels for every geometry into a PNG.

    Raises:
        ValueError: if no row holds a measurement.
    """
    import matplotlib
    from matplotlib.figure import Figure

    measured = [row for row in rows if "error" not in row]
    geometries = list(dict.fromkeys(row["geometry"] for row in measured))
    if not geometries:
        raise ValueError("nothing to plot: every case failed")
    with matplotlib.rc_context({"font.size": 8}):
        # A figure of its own, not pyplot's: it needs no display and leaves no global state.
        figure = Figure(figsize=(10, 4 * len(geometries)), layout="constrained")
        axes = figure.subplots(len(geometries), len(_PANELS), squeeze=False)
        for panels, geometry in zip(axes, geometries, strict=True):
            chosen = [row for row in measured if row["geometry"] == geometry]
            for axis, (key, label) in zip(panels, _PANELS, strict=True):
                _draw(axis, chosen, key)
                axis.margins(x=0.1)
                axis.set(xlabel=label, ylabel="times as fast as bf16 eager", title=geometry)
            panels[0].legend(frameon=False)
        figure.savefig(target, dpi=120, format="png")


def _draw(axis: Any, rows: Sequence[Row], key: str) -> None:
    axis.axhline(1, color="#b8c4cc", linewidth=1, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    labelled = set()
    for row in rows:
        implementation, mode = row["implementation"], row["mode"]
        name = f"{implementation}, {mode}"
        axis.scatter(
            row[key],
            row["ratio"],
            color=_COLORS.get(implementation, "#444444"),
            marker=_MARKERS.get(mode, "x"),
            label=None if name in labelled else name,
        )
        labelled.add(name)
    for point, methods in _together(rows, key).items():
        axis.annotate(", ".join(methods), point, xytext=(4, 3), textcoords="offset points", fontsize=7)


def _together(rows: Sequence[Row], key: str) -> dict[tuple[float, float], list[str]]:
    """The methods at each point, those so close that their labels would overlap at the first of them."""
    width = max(row[key] for row in rows) - min(row[key] for row in rows)
    height = max(row["ratio"] for row in rows) - min(row["ratio"] for row in rows)
    found: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        here = row[key], row["ratio"]
        close = (at for at in found if abs(at[0] - here[0]) <= _CLOSE * width and abs(at[1] - here[1]) <= _CLOSE * height)
        methods = found.setdefault(next(close, here), [])
        if row["method"] not in methods:
            methods.append(row["method"])
    return found
