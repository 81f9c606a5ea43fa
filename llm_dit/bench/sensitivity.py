"""Which layers a method harms most for the bytes it saves, and which to leave alone for a given quality.

One group of layers is quantized at a time in a bf16 model, and the pictures are compared. Groups are ranked by harm, the squared
relative error of the final latents, per byte saved: squared, because errors of layers add like noise. Leaving the first k
of the ranking alone is then tried for real, and a small k that holds the quality asked for becomes a `skip` list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..names import check_name
from ..quantization import get_method
from ..quantization.component import require_quantizable
from ..quantization.filters import Layer, decide_layers
from ..quantization.sizes import tensor_bytes
from ..quantization.torchao_tensors.stream import quantize_weight
from ..writing import write_text
from .picture_metrics import psnr, require_metrics
from .pictures import batches, fingerprint, load, make
from .results import Row, read_rows

GROUPINGS: Final = ("kind", "block")


@dataclass(frozen=True)
class Options:
    """What to try.

    Attributes:
        source: a pipeline's folder or repository.
        method: of the transformer.
        prompts: one picture each; the n-th is made with seed n.
        by: groups of layers: "kind" (one Linear of all blocks that are alike) or "block".
        call: further arguments of the pipeline's call.
        output: JSON of the rows, from which an interrupted run goes on.
        batch: prompts of one call.
    """

    source: str
    method: str
    prompts: tuple[str, ...]
    by: str = "kind"
    call: Mapping[str, Any] | None = None
    output: Path | None = None
    batch: int = 1


@dataclass(frozen=True)
class Mix:
    """A choice of layers.

    Attributes:
        skip: patterns of what stays in bf16, as config.toml and `quantization_skip` take them.
        psnr: median PSNR in dB against bf16.
        bytes: of the transformer.
    """

    skip: tuple[str, ...]
    psnr: float
    bytes: int


class Sensitivity:
    """One pipeline in bf16, whose layers are quantized and put back.

    Raises:
        ValueError: for unknown names, a method that quantizes nothing, or where a library is missing.
    """

    def __init__(self, options: Options) -> None:
        require_metrics()
        self.options, self.method = options, get_method(options.method)
        check_name(options.by, GROUPINGS, "grouping")
        if self.method.name == "none":
            raise ValueError("'none' quantizes nothing whose harm could be measured: give another method, e.g. int4")
        self.pipe = load(options.source, torch_dtype=torch.bfloat16)
        layers = decide_layers(self.pipe.transformer, self.method, "transformer", "per-row")
        require_quantizable(layers, self.method, "transformer")
        self.layers = [layer for layer in layers if layer.config is not None]
        self.groups: dict[str, list[Layer]] = {}
        for layer in self.layers:
            self.groups.setdefault(group_of(layer.name, options.by), []).append(layer)
        self.reference = self.generate()

    def rows(self) -> Iterator[Row]:
        """A row for every group, as it is measured; those that `output` holds are not measured again."""
        kept = read_rows(self.options.output)
        known = {row["group"]: row for row in kept if row.get("question") == self._question}
        others = [row for row in kept if row.get("question") != self._question]
        rows = []
        for group, layers in tqdm(self.groups.items(), desc="Groups", delay=2, leave=False):
            row = known.get(group) or self._row(group, layers)
            rows.append(row)
            if self.options.output:
                write_text(self.options.output, json.dumps(others + rows, indent=2) + "\n")
            yield row

    def _row(self, group: str, layers: Sequence[Layer]) -> Row:
        with self._quantized(layers) as saved:
            latents, pictures = self.generate()
        error = mean(relative(found, wanted) for found, wanted in zip(latents, self.reference[0], strict=True))
        return {
            "question": self._question,
            "source": self.options.source,
            "method": self.method.name,
            "group": group,
            "layers": len(layers),
            "bytes_saved": saved,
            "error": error,
            "psnr": self.psnr(pictures),
            "harm_per_mib": error**2 / (saved / 2**20),
        }

    @cached_property
    def _question(self) -> str:
        """What a row answers: rows of another model, method, grouping, call or other prompts are measured anew."""
        options = self.options
        asked = (fingerprint(options.source), self.method.name, options.by, options.prompts, sorted((options.call or {}).items()))
        return blake2b(repr(asked).encode(), digest_size=8).hexdigest()

    @cached_property
    def uniform(self) -> Mix:
        """All groups quantized."""
        return self.measure(())

    def best(self, rows: Sequence[Row], at_least: float) -> Mix:
        """Few bytes with a median PSNR of `at_least` dB: `uniform`, or the worst groups left alone, as few as bisection finds.

        PSNR mostly rises with every group that is left alone; where it once falls, fewer may hold than are found.

        Raises:
            ValueError: if quantizing the least harmful group alone is already worse.
        """
        if self.uniform.psnr >= at_least:
            return self.uniform
        ranked = [row["group"] for row in sorted(rows, key=lambda row: -row["harm_per_mib"])]
        low, high, found = 1, len(ranked) - 1, None
        while low <= high:
            middle = (low + high) // 2
            mix = self.measure(ranked[:middle])
            if mix.psnr >= at_least:
                found, high = mix, middle - 1
            else:
                low = middle + 1
        if found is None:
            raise ValueError(f"{self.method.name} cannot hold {at_least:g} dB: {ranked[-1]!r} alone gives less; ask for less")
        return found

    def measure(self, skip: Sequence[str]) -> Mix:
        """All groups but those of `skip` quantized at once."""
        layers = [layer for group, members in self.groups.items() if group not in skip for layer in members]
        with self._quantized(layers):
            _, pictures = self.generate()
            size = sum(tensor_bytes(parameter) for parameter in self.pipe.transformer.parameters())
        return Mix(tuple(skip), self.psnr(pictures), size)

    @contextmanager
    def _quantized(self, layers: Sequence[Layer]) -> Iterator[int]:
        """While it lasts, `layers` are quantized; yields the bytes that saves."""
        weights, saved = [], 0
        for layer in layers:
            assert layer.config is not None
            weight = quantize_weight(layer.weight.detach(), layer.config)
            saved += tensor_bytes(layer.weight) - tensor_bytes(weight)
            weights.append((layer, weight))
        with self.replaced(weights):
            yield saved

    @contextmanager
    def replaced(self, weights: Sequence[tuple[Layer, Tensor]]) -> Iterator[None]:
        """While it lasts, layers have other weights."""
        before = [(layer.module, layer.module._parameters["weight"]) for layer, _ in weights]
        try:
            for layer, weight in weights:
                layer.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for module, parameter in before:
                module._parameters["weight"] = parameter

    def generate(self) -> tuple[list[Tensor], list[np.ndarray]]:
        """(final latents, pictures) of all prompts."""
        latents: list[Tensor] = []
        pictures: list[np.ndarray] = []
        for prompts in batches(self.options.prompts, self.options.batch):
            for made in make(self.pipe, self.options.source, prompts, self.options.call or {}):
                latents.append(made.latents[-1])
                pictures += made.pictures
        return latents, pictures

    def psnr(self, pictures: Sequence[np.ndarray]) -> float:
        """Median PSNR in dB of pictures of all prompts against bf16."""
        return median(psnr(wanted, found) for wanted, found in zip(self.reference[1], pictures, strict=True))


def group_of(name: str, by: str) -> str:
    """The pattern of the group that a layer belongs to; one outside of the blocks is its own.

    Example:
        >>> group_of("layers.3.attention.to_q", "kind"), group_of("layers.3.attention.to_q", "block")
        ('layers.*.attention.to_q', 'layers.3')
    """
    block = re.match(r"(.*?\.)(\d+)\.(.+)", name)
    if block is None:
        return name
    owner, index, inner = block.groups()
    return f"{owner}*.{inner}" if by == "kind" else f"{owner}{index}"


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    return float((found - wanted).norm() / wanted.norm())


def toml_of(family: str, method: str, mix: Mix) -> str:
    """The section of config.toml that loads a mix."""
    choices = {"quantization_transformer": method, "quantization_skip": mix.skip}
    return "".join([f"[{family}]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in choices.items())])
