"""Draws a result of `benchmarks/speed.py` (its --output file) that was measured elsewhere: speed against memory and error.

python benchmarks/plot_speed.py benchmarks/results/speed-h200.json docs/speed.png klein-9b z-image
"""

import sys
from pathlib import Path

from llm_dit.bench.plots import draw
from llm_dit.bench.results import read_rows

if __name__ == "__main__":
    source, target, *geometries = sys.argv[1:]
    draw([row for row in read_rows(Path(source)) if not geometries or row["geometry"] in geometries], Path(target))
