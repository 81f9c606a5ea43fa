"""Ways to choose int4 values, compared on what a model draws: groups, symmetry, where a group's range ends, low rank.

Weights are replaced by what the 4-bit values stand for, so that any grid can be tried without a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..load import pipeline_class_of
from ..quantization.torchao_tensors.int4 import fitted_range, group_size_for, searched_range
from ..tiny import scenes
from .results import Row
from .sensitivity import Sensitivity, relative

_SCALE_BITS: Final = 16
"""Of a scale, and of a zero point: bfloat16."""


@dataclass(frozen=True)
class Grid:
    """One way.

    Attributes:
        group: weights of a row that share a scale, at most.
        range: what the 16 values span: "fitted" as the method int4 does, by least squares; "searched" the share of smallest
            to largest that its fit starts from; "minmax" all of it; "symmetric" around 0; "hqq" all of it, with the zero
            point that half-quadratic splitting finds (Badri and Shaji, 2023: mobiusml.github.io/hqq_blog).
        rank: of a correction U V in bfloat16 beside the weight, the best for its error (LQER, arXiv:2402.02446); 0 is none.
    """

    group: int
    range: str
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.range}, groups of {self.group}" + (f", rank {self.rank}" if self.rank else "")

    def bits(self, rows: int, columns: int) -> float:
        """Stored bits per weight of a Linear [rows, columns]."""
        scales = _SCALE_BITS * (1 if self.range == "symmetric" else 2) / group_size_for(columns, self.group)
        return 4 + scales + 16 * self.rank * (rows + columns) / (rows * columns)

    def apply(self, weight: Tensor) -> Tensor:
        """The weight [N, K] that the 4-bit values of `weight` stand for, in its dtype."""
        rows, columns = weight.shape
        grouped = weight.float().view(rows, -1, group_size_for(columns, self.group))
        found = _RANGES[self.range](grouped).view(rows, columns)
        if self.rank:
            left, values, right = torch.linalg.svd(weight.float() - found, full_matrices=False)
            left, right = (left * values)[:, : self.rank].bfloat16().float(), right[: self.rank].bfloat16().float()
            found = found + left @ right
        return found.to(weight.dtype)


GRIDS: Final = (
    Grid(128, "fitted"),
    Grid(128, "searched"),
    Grid(128, "minmax"),
    Grid(128, "hqq"),
    Grid(64, "symmetric"),
    Grid(64, "minmax"),
    Grid(64, "fitted"),
    Grid(32, "symmetric"),
    Grid(32, "minmax"),
    Grid(32, "fitted"),
    Grid(16, "fitted"),
    Grid(8, "fitted"),
    Grid(128, "fitted", rank=4),
)


def require_pictures(source: str) -> None:
    """Raises ValueError for a pipeline that makes clips, whose captions are scored otherwise."""
    if pipeline_class_of(source).family.generation.video:
        raise ValueError(f"{source!r} makes clips, and grids are compared on pictures: give a pipeline that makes pictures")


def compare(trial: Sensitivity, grids: Sequence[Grid] = GRIDS) -> Iterator[Row]:
    """A row for every grid, applied to all layers that int4 would quantize."""
    for grid in tqdm(grids, desc="Grids", delay=2, leave=False):
        weights = [(layer, grid.apply(layer.weight.detach())) for layer in trial.layers]
        with trial.replaced(weights):
            latents, pictures = trial.generate()
        stored = sum(grid.bits(*layer.weight.shape) * layer.weight.numel() for layer in trial.layers)
        scores = [scenes.score(picture, prompt).whole for picture, prompt in zip(pictures, trial.options.prompts, strict=True)]
        yield {
            "source": trial.options.source,
            "grid": grid.name,
            "bits": stored / sum(layer.weight.numel() for layer in trial.layers),
            "error": mean(relative(found, wanted) for found, wanted in zip(latents, trial.reference[0], strict=True)),
            "psnr": trial.psnr(pictures),
            "caption_score": mean(scores),
        }


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows."""
    lines = ["| grid | bits a weight | latent error | PSNR dB | captions right |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row["grid"], f"{row['bits']:.2f}", f"{row['error']:.4f}", f"{row['psnr']:.1f}", f"{row['caption_score']:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _between(grouped: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[N, groups, G] rounded to 16 values from low to high, both [N, groups, 1]; scales as they are stored."""
    step = ((high - low) / 15).bfloat16().float().clamp(min=torch.finfo(torch.bfloat16).tiny)
    return _snapped(grouped, low.bfloat16().float(), step)


def _snapped(grouped: Tensor, low: Tensor, step: Tensor) -> Tensor:
    return ((grouped - low) / step).round().clamp(0, 15) * step + low


def _minmax(grouped: Tensor) -> Tensor:
    return _between(grouped, grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True))


def _symmetric(grouped: Tensor) -> Tensor:
    scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float().clamp(min=torch.finfo(torch.bfloat16).tiny)
    return (grouped / scale).round().clamp(-8, 7) * scale


def _chosen(choose: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]], grouped: Tensor) -> Tensor:
    low, step = choose(grouped, torch.bfloat16)
    return _snapped(grouped, low.float().unsqueeze(-1), step.float().unsqueeze(-1))


def _hqq(grouped: Tensor, norm: float = 0.7, beta: float = 10.0, growth: float = 1.01, steps: int = 20) -> Tensor:
    """With the parameters of the authors' implementation."""
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny)
    zero = -low / step
    for _ in range(steps):
        values = (grouped / step + zero).round().clamp(0, 15)
        error = grouped - step * (values - zero)
        size = error.abs()
        sparse = error.sign() * (size - size.clamp(min=1e-8) ** (norm - 1) / beta).clamp(min=0)
        zero = (values - (grouped - sparse) / step).mean(-1, keepdim=True)
        beta *= growth
    return _between(grouped, -zero * step, (15 - zero) * step)


_RANGES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "minmax": _minmax,
    "symmetric": _symmetric,
    "searched": partial(_chosen, searched_range),
    "fitted": partial(_chosen, fitted_range),
    "hqq": _hqq,
}
