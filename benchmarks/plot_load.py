"""Draws a result of `benchmarks/load.py` (its --output file): load time and the peaks of device and host memory.

python benchmarks/plot_load.py benchmarks/results/load-klein-9b-h200.json docs/load.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from llm_dit.bench.load import Case

GIB = 1024**3


def main(source: Path, target: Path) -> None:
    rows = [row for row in json.loads(source.read_text()) if not row["error"]]
    labels = [Case(**row["case"]).label.replace(", device_map='cuda'", "\nto the GPU") for row in rows]
    colors = ["#2a7f62" if row["case"]["implementation"].startswith("llm-dit") else "#b8c4cc" for row in rows]
    panels = (
        ("seconds, moving to the GPU included", [row["seconds"] for row in rows]),
        ("device peak, GiB", [row["device_peak_bytes"] / GIB for row in rows]),
        ("host peak, GiB", [row["host_peak_bytes"] / GIB for row in rows]),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 0.8 + 0.4 * len(rows)), sharey=True, layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.barh(labels, values, color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
