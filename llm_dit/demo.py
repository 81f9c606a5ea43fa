"""`make demo`: the same captions drawn by a trained tiny Z-Image in bf16 and under every method, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from .bench import quality
from .bench.quality_report import contact_sheet
from .bench.results import Row
from .load import load_pipeline
from .quantization import VALID_METHODS
from .tiny.trained import trained

PROMPTS: Final = (
    "a small red circle above a large blue square",
    "a large green triangle to the left of a small yellow cross",
    "a small cyan square below a large purple circle",
)


@dataclass(frozen=True)
class Shown:
    """What the demo made.

    Attributes:
        sheet: the contact sheet, PNG.
        rows: what was measured, by method.
        report: what loading with the first method said that it did.
    """

    sheet: Path
    rows: list[Row]
    report: str


def run_demo(folder: Path, methods: Sequence[str] = VALID_METHODS, prompts: Sequence[str] = PROMPTS) -> Shown:
    """Draws, compares and writes `folder`/demo.png; an interrupted run goes on.

    Args:
        folder: where the pictures go; made if it is not there.
        methods: of the transformer, beside bf16.
        prompts: captions of scenes.
    """
    options = quality.Options(
        str(trained("z-image")),
        tuple(methods),
        tuple(prompts),
        folder / "pictures",
        captions=True,
        floor="skip",
        batch=len(prompts),
    )
    rows = list(quality.run(options))
    sheet = folder / "demo.png"
    contact_sheet(rows, options.folder, options.prompts).save(sheet)
    pipe = load_pipeline(options.source, quantization={"transformer": methods[0], "vae": "int8"}, torch_dtype=torch.bfloat16)
    return Shown(sheet, rows, str(pipe.quantization_report))
