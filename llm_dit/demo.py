"""`make demo`: a tiny Z-Image, from nothing to a picture and a report."""

from __future__ import annotations

from pathlib import Path

from .generate import Generated, GenerateOptions, generate
from .tiny import build


def run_demo(folder: Path, method: str = "int8", steps: int = 8) -> Generated:
    """Builds a tiny Z-Image with random weights, saves it, loads it quantized and generates.

    The weights are random, so the picture is noise: what it shows is that the whole path works.

    Args:
        folder: where the pipeline and demo.png go; made if it is not there.
        method: the method of the transformer and the encoder; the vae is in int8.
        steps: denoising steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "tiny-z-image"
    build("z-image").save_pretrained(model)
    return generate(
        GenerateOptions(
            model=str(model),
            prompt="a red circle above a blue square",
            output=folder / "demo.png",
            load={"quantization": {"transformer": method, "encoder": method, "vae": "int8"}},
            call={"height": 128, "width": 128, "num_inference_steps": steps, "guidance_scale": 0.0},
            device="cpu",
        )
    )
