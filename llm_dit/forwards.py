"""One forward of each component with the sizes that its pipeline gives it: what is counted on meta, and measured on a device.

The families say what their components are given; here is what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

Keywords = dict[str, Any]
FRAME_RATE: Final = 24.0
"""Frames a second of a clip, the default of LTX-2's pipelines."""
REFERENCE_PIXELS: Final = 1024 * 1024
"""FLUX.2's and Qwen-Image's pipelines make a larger reference image so large."""


@dataclass(frozen=True)
class Size:
    """What is generated at once.

    Attributes:
        height, width: pixels.
        frames: of a clip; 1 for an image.
        batch: pictures or clips at once.
        references: images that are given along with the prompt.
        text: tokens of the prompt; 0 for the most that the pipeline passes on.
    """

    height: int
    width: int
    frames: int = 1
    batch: int = 1
    references: int = 0
    text: int = 0

    def __str__(self) -> str:
        words = [f"{self.width} x {self.height}"]
        words += [f"{self.frames} frames"] if self.frames > 1 else []
        words += [f"batch {self.batch}"] if self.batch > 1 else []
        words += [f"{self.references} references"] if self.references else []
        return ", ".join(words)

    @property
    def reference_pixels(self) -> int:
        """Pixels of one reference image, taken to be as large as the picture."""
        return min(self.height * self.width, REFERENCE_PIXELS)


Inputs = Callable[[Any, torch.device, Size], Keywords]
"""From a component, a device and a size, the keyword arguments of its forward, or of a VAE's `decode`."""
Run = Callable[[Any, torch.device, Size], Any]
"""Runs what the pipeline does with an encoder, and returns what it keeps of it."""


@dataclass(frozen=True)
class Forwards:
    """The forwards of a family's pipelines.

    Attributes:
        step: one forward of the transformer, guidance not counted in.
        latents: one decode of the VAE.
        encoders: by component name, in their order, what the pipeline does with a prompt.
        pixels_per_token: of a side of the picture; sizes are multiples of it.
        guided_batch: how many entries of the transformer's batch one picture is, with the defaults of `Generation`.
        most_references: how many reference images the published pipelines take.
        kept: bytes a picture that a call keeps of its encoders' outputs until it returns.
        frames_step: frames come as a multiple of this, and one; 0 for images.
    """

    step: Inputs
    latents: Inputs
    encoders: Mapping[str, Run] = field(default_factory=dict)
    pixels_per_token: int = 16
    guided_batch: int = 1
    most_references: int = 0
    kept: int = 0
    frames_step: int = 0

    def check(self, title: str, height: int | None, width: int | None, num_frames: int | None) -> None:
        """Raises ValueError, with the nearest, for a size that pipelines refuse or silently round; None is not looked at.

        Neither are the frames of images.
        """
        step = self.pixels_per_token
        for name, value in (("height", height), ("width", width)):
            _check_step(value, step, 0, f"{title} makes pictures whose {name} is a multiple of {step}")
        if step := self.frames_step:
            _check_step(num_frames, step, 1, f"{title} makes clips of a multiple of {step} frames and one")


def _check_step(value: int | None, step: int, first: int, words: str) -> None:
    """Raises ValueError unless the value is `first` and a multiple of `step`, and more than 0."""
    if value is None:
        return
    near = max(round((value - first) / step), 1 - first) * step + first
    if value != near:
        raise ValueError(f"{words}, not {value}: {near} is the nearest")


def noise(device: torch.device, *shape: int, seed: int = 1) -> Tensor:
    """Standard normal bfloat16; empty on meta."""
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), dtype=torch.bfloat16, device=device)


def prompt_tokens(device: torch.device, batch: int, tokens: int) -> Keywords:
    """A prompt without padding, as a tokenizer returns it."""
    shape = (batch, tokens)
    return {
        "input_ids": torch.ones(shape, dtype=torch.int64, device=device),
        "attention_mask": torch.ones(shape, dtype=torch.int64, device=device),
    }


def image_latents(vae: Any, device: torch.device, size: Size) -> Keywords:
    """`decode` of a VAE of images."""
    compression = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (size.batch, vae.config.latent_channels, size.height // compression, size.width // compression)
    return {"z": noise(device, *shape), "return_dict": False}
