"""python -m llm_dit.tiny.training z-image --folder runs --output models"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ...names import CALL_FILE, check_name
from .course import Course, Plan
from .data import CLIPS, PICTURES, draw_all
from .flux2 import KleinCourse
from .loop import Budget
from .ltx2 import Ltx2Course
from .qwen_image import QwenImageCourse
from .stages import train_denoiser
from .z_image import ZImageCourse

COURSES: dict[str, Course] = {course.name: course for course in (ZImageCourse(), KleinCourse(), QwenImageCourse(), Ltx2Course())}
SUBJECTS = {"scenes": PICTURES, "clips": CLIPS}


def train(
    name: Annotated[
        str,
        typer.Argument(
            help="z-image, flux2-klein, qwen-image or ltx-2; scenes (as many as asked for) or clips draws them alone."
        ),
    ],
    folder: Annotated[Path, typer.Option(help="Scenes and checkpoints; a run goes on from them.")],
    output: Annotated[Path | None, typer.Option(help="Where the pipeline goes; the folder.")] = None,
    scenes: Annotated[int | None, typer.Option(min=16, help="Pictures or clips to train on.")] = None,
    vae_minutes: Annotated[float | None, typer.Option(min=0, help="Of the autoencoder.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Of transformer and text encoder.")] = None,
    vae_batch: Annotated[int | None, typer.Option(min=1)] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    compile_blocks: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile blocks of both models.")] = True,
    capture: Annotated[bool, typer.Option(help="On a GPU, replay steps as a CUDA graph.")] = True,
) -> None:
    """Trains a tiny model, and saves it as a pipeline in bfloat16; amounts left out are the model's own."""
    check_name(name, (*COURSES, *SUBJECTS), "model")
    if name in SUBJECTS:
        draw_all(folder / "scenes", scenes or SUBJECTS[name].count, SUBJECTS[name])
        return
    course = COURSES[name]
    asked = {"vae_minutes": vae_minutes, "minutes": minutes, "vae_batch": vae_batch, "batch": batch, "scenes": scenes}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    amounts = dataclasses.replace(course.amounts, **given)
    drawn = draw_all(folder / "scenes", amounts.scenes or course.subject.count, course.subject)
    checkpoint = folder / f"{name}.safetensors"
    plan = Plan(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"), amounts, capture, checkpoint)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    pipe: Any = course.build()
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.to(plan.device)
    clean = course.latents(pipe, drawn, plan)
    if compile_blocks:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        for module in pipe.text_encoder.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                module.compile()
    budget = Budget(amounts.minutes, 3e-3, capture)
    train_denoiser(course, pipe, clean, drawn.captions, budget, checkpoint, amounts.batch)
    save(course, pipe, output or folder)


def save(course: Course, pipe: Any, output: Path) -> None:
    """Writes the trained pipeline in bfloat16, and beside it what it is called with."""
    final, written = output / course.name, output / f".{course.name}"
    shutil.rmtree(written, ignore_errors=True)
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False).to("cpu", torch.bfloat16)
    pipe.save_pretrained(written)
    (written / CALL_FILE).write_text(json.dumps(dict(course.call), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    written.replace(final)


if __name__ == "__main__":
    typer.run(train)
