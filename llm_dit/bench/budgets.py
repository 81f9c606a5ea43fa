"""Does what a plan promises hold? Pipelines of the published sizes load and generate with the allocator limited to a budget.

The weights are random. A planned pipeline lies on disk as it was quantized, made tensor by tensor, so that the bf16 model never
exists; it is then loaded with `quantization="auto"`, as a user would. The peers' pipelines are put on the device in the same
limit, tensor by tensor, as their libraries hold them: plain diffusers in bf16, and diffusers with a `TorchAoConfig` of int8 for
transformer and encoder.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from ..families import published_models, quantizable_class
from ..load import load_pipeline
from ..names import nearest
from ..planning.auto import plan_for
from ..planning.card import parse_bytes
from ..planning.constants import constants
from ..planning.phases import NAMES as PHASES
from ..planning.plan import Plan
from ..quantization import detect_hardware
from .end_to_end import PROMPT
from .random_pipeline import fill, published_pipeline
from .results import Columns, Job, Row
from .timing import GIB
from .worker import FATAL, ROW, emit, messages

WAYS: Final = ("llm-dit auto", "diffusers bf16", "diffusers int8")
BUDGETS: Final[Mapping[str, str]] = {
    "klein-4b": "8GB",
    "z-image-turbo": "8GB",
    "qwen-image": "16GB",
    "ltx-2.3": "24GB",
    "flux2-dev": "24GB",
}
"""What was promised to fit."""
TINY: Final[Mapping[str, str]] = {"klein-4b": "flux2-klein", "z-image-turbo": "z-image", "qwen-image": "qwen-image"} | {
    "ltx-2.3": "ltx2.3",
    "flux2-dev": "flux2-dev",
}
"""The tiny pipeline that lends its tokenizer and scheduler."""
COLUMNS: Final[Columns] = (
    ("model", ""),
    ("budget", ""),
    ("way", ""),
    ("success", ""),
    *((f"{phase}_{what}_gib", ".2f") for phase in PHASES for what in ("promised", "measured")),
    ("seconds", ".0f"),
    ("reason", ""),
)


@dataclass(frozen=True)
class Case:
    """One pipeline in one budget.

    Attributes:
        model: offline name of a published model, or a tiny pipeline.
        budget: as in `vram_budget`.
        way: one of `WAYS`.
    """

    model: str
    budget: str
    way: str


@dataclass(frozen=True)
class Options:
    """How to measure: where the pipelines lie, denoising steps, and seconds after which a process is given up."""

    folder: Path
    steps: int = 2
    timeout_s: float = 400.0


def plan(models: Sequence[str], budget: str | None, options: Options) -> Job:
    """All ways of each model, in its budget of `BUDGETS` or in `budget`.

    Raises:
        ValueError: for an unknown model, or a budget that is none.
    """
    from ..tiny import tiny_pipelines

    for name in models:
        if name not in BUDGETS and (budget is None or name not in tiny_pipelines()):
            raise ValueError(f"unknown model {name!r}: {nearest(name, tuple(BUDGETS))}")
    if budget is not None:
        parse_bytes(budget)
    cases = [Case(model, budget or BUDGETS[model], way) for model in models or BUDGETS for way in WAYS]
    return Job(cases, partial(run, options=options), COLUMNS)


def run(cases: Sequence[Case], options: Options) -> Iterator[Row]:
    """Each case in a process of its own; a pipeline's folder is there while its row is measured, and no longer."""
    for case in cases:
        folder = options.folder / f"{case.model}-{case.budget}"
        start = time.perf_counter()
        error = ""
        if case.way == WAYS[0] and not (folder / "model_index.json").is_file():
            options.folder.mkdir(parents=True, exist_ok=True)
            error = _process(case, folder, options, "build").get("error", "")
        found = {"error": error} if error else _process(case, folder, options, "run")
        shutil.rmtree(folder, ignore_errors=True)
        seconds = time.perf_counter() - start
        success = "yes" if "error" not in found else "no"
        expected = {"reason": found.pop("error")} if "error" in found and case.way != WAYS[0] else {}
        device = {"device": detect_hardware().name, "torch": torch.__version__}
        yield {**asdict(case), "success": success, "seconds": seconds, **device, **expected, **found}


def _process(case: Case, folder: Path, options: Options, task: str) -> Row:
    specification = {"case": asdict(case), "folder": str(folder), "steps": options.steps, "task": task}
    message = next(messages("llm_dit.bench.budgets", specification, options.timeout_s))
    return dict(message.value) if message.kind == ROW else {"error": str(message.value)}


def build(case: Case, folder: Path) -> None:
    """Writes the pipeline as its plan wants it quantized."""
    planned = plan_for(case.model, parse_bytes(case.budget)) if case.model in BUDGETS else None
    pipe = _pipeline(case.model, planned, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pipe.save_pretrained(folder, max_shard_size="5GB")


def _pipeline(model: str, planned: Plan | None, device: torch.device) -> Any:
    from ..tiny import build as build_tiny

    if planned is None:
        return build_tiny(model)
    return published_pipeline(model, TINY[model], planned, device)


def measure(case: Case, folder: Path, steps: int) -> Row:
    """Loads and generates in this process, inside the budget."""
    budget, cuda = parse_bytes(case.budget), torch.cuda.is_available()
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((budget - constants().context_bytes) / total)
    if case.way == WAYS[0]:
        pipe = load_pipeline(folder, quantization="auto", vram_budget=budget, torch_dtype=torch.bfloat16)
    else:
        pipe = _peer(case, torch.device("cuda" if cuda else "cpu"))
    pipe.set_progress_bar_config(disable=True)
    pipe(**_call(pipe, case, folder, steps))
    if case.way != WAYS[0]:
        peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
        return {"denoise_measured_gib": peak}
    recorder = pipe._recorder
    assert recorder is not None
    row: Row = {"plan": str(recorder.plan), "report": pipe.quantization_report.to_dict()["notes"]}
    for phase, found in recorder.to_dict().items():
        row[f"{phase}_promised_gib"] = found["promised"] / GIB
        row[f"{phase}_measured_gib"] = None if found["allocated"] is None else found["allocated"] / GIB
        row[f"{phase}_reserved_gib"] = None if found["reserved"] is None else found["reserved"] / GIB
    return row


def _peer(case: Case, device: torch.device) -> Any:
    """The pipeline as a peer holds it, all of it on the device."""
    from ..tiny import build as build_tiny

    tiny = build_tiny(TINY.get(case.model, case.model))
    if case.model in BUDGETS:
        stock = case.way == WAYS[2]
        for name, make in published_models()[case.model].components.items():
            role = quantizable_class(published_models()[case.model].pipeline_class).family.role(name)
            setattr(tiny, name, fill(make, device, stock="int8" if stock and role != "vae" else None))
        return tiny
    return tiny.to(device)


def _call(pipe: Any, case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """The arguments of one generation: the family's defaults at full size, the tiny pipeline's own at tiny size."""
    if case.model not in BUDGETS:
        from ..tiny import get

        return dict(get(case.model).call())
    from ..generate import GenerateOptions, call_arguments

    family = quantizable_class(type(pipe).__name__).family
    pipe.family = family  # a peer's pipeline is diffusers' own, and takes the same arguments
    return call_arguments(pipe, GenerateOptions(str(folder), PROMPT, folder, call={"num_inference_steps": steps}))


def main(specification: Mapping[str, Any]) -> None:
    """The working process."""
    case, folder = Case(**specification["case"]), Path(specification["folder"])
    try:
        if specification["task"] == "build":
            build(case, folder)
            emit(ROW, {})
        else:
            emit(ROW, measure(case, folder, specification["steps"]))
    except Exception as error:
        emit(FATAL, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
