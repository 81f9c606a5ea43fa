"""python -m llm_dit.tiny.training z-image --folder runs --output models"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ...names import check_name
from .course import Course
from .data import draw_all
from .flux2 import KleinCourse
from .loop import Budget
from .qwen_image import QwenImageCourse
from .stages import encode_all, reconstruction_score, train_autoencoder, train_denoiser
from .z_image import ZImageCourse

COURSES: dict[str, Course] = {course.name: course for course in (ZImageCourse(), KleinCourse(), QwenImageCourse())}


def train(
    name: Annotated[str, typer.Argument(help="z-image, flux2-klein or qwen-image; scenes draws what they train on.")],
    folder: Annotated[Path, typer.Option(help="Scenes and checkpoints; a run goes on from them.")],
    output: Annotated[Path | None, typer.Option(help="Where the pipeline goes; the folder.")] = None,
    scenes: Annotated[int, typer.Option(min=16, help="Pictures to train on.")] = 131072,
    vae_minutes: Annotated[float, typer.Option(min=0)] = 1.5,
    minutes: Annotated[float, typer.Option(min=0, help="Of transformer and text encoder.")] = 5,
    vae_batch: Annotated[int, typer.Option(min=1)] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 512,
    compile_blocks: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile blocks of both models.")] = True,
    capture: Annotated[bool, typer.Option(help="On a GPU, replay steps as a CUDA graph.")] = True,
) -> None:
    """Trains a tiny model, and saves it as a pipeline in bfloat16."""
    drawn = draw_all(folder / "scenes", scenes)
    if name == "scenes":
        return
    check_name(name, tuple(COURSES), "model")
    course = COURSES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    pipe: Any = course.build()
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.to(device)
    pictures = drawn.on(device)
    train_autoencoder(
        course, pipe.vae, pictures, Budget(vae_minutes, 1.5e-3, capture), folder / f"{name}-vae.safetensors", vae_batch
    )
    pipe.vae.eval()
    latents = course.set_statistics(pipe.vae, encode_all(course, pipe.vae, pictures))
    share = reconstruction_score(course, pipe.vae, 200, device)
    typer.echo(f"{name}: {share:.1%} of 200 reconstructed scenes are read right")
    with torch.inference_mode():
        clean = torch.cat([course.clean(pipe.vae, part).bfloat16() for part in latents.split(4096)])
    clean = clean.clone()
    del pictures, latents
    if compile_blocks:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        for module in pipe.text_encoder.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                module.compile()
    train_denoiser(course, pipe, clean, drawn.captions, Budget(minutes, 3e-3, capture), folder / f"{name}.safetensors", batch)
    save(course, pipe, output or folder)


def save(course: Course, pipe: Any, output: Path) -> None:
    """Writes the trained pipeline in bfloat16, and beside it what it is called with."""
    final, written = output / course.name, output / f".{course.name}"
    shutil.rmtree(written, ignore_errors=True)
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False).to("cpu", torch.bfloat16)
    pipe.save_pretrained(written)
    (written / "call.json").write_text(json.dumps(dict(course.call), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    written.replace(final)


if __name__ == "__main__":
    typer.run(train)
