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
from .quantization import METHODS
from .quantization.hardware import lack_of_support
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
        left_out: why methods that were not asked for by name are not there: this machine lacks them.
    """

    sheet: Path
    rows: list[Row]
    report: str
    left_out: list[str]


def run_demo(folder: Path, methods: Sequence[str] = (), prompts: Sequence[str] = PROMPTS) -> Shown:
    """Draws, compares and writes `folder`/demo.png; an interrupted run goes on.

    Args:
        folder: where the pictures go; made if it is not there.
        methods: of the transformer, beside bf16; all that run on this machine if there are none.
        prompts: captions of scenes.
    """
    left_out: list[str] = []
    if not methods:
        lacking = {name: lack_of_support(method) for name, method in METHODS.items() if name != quality.REFERENCE}
        methods = [name for name, reason in lacking.items() if reason is None]
        left_out = [reason for reason in lacking.values() if reason is not None]
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
    return Shown(sheet, rows, str(pipe.quantization_report), left_out)
