"""Pictures of many prompts, the n-th with seed n, with the latents after every step: what comparing methods starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ..generate import GenerateOptions, call_arguments
from ..load import load_pipeline

FRAMES: Final = 8
"""Frames of a clip that are compared, evenly spread."""
_READ: Final = 1 << 20
_PLACES: Final = 64
"""Of a file, so many bytes at so many places tell it from another: retraining or quantizing changes all of it."""
_REPEATED: Final = ("negative_prompt",)
"""Arguments that a call with several prompts takes as many of."""


@dataclass(frozen=True)
class Made:
    """What one prompt became.

    Attributes:
        pictures: [H, W, 3] uint8; one, or frames of a clip.
        latents: after every step, float32 on the host.
        sound: of a clip that has one, [channels, samples] float32 on the host.
    """

    pictures: list[np.ndarray]
    latents: list[Tensor]
    sound: Tensor | None = None


def fingerprint(source: str) -> str:
    """Tells a folder's pipeline from others, wherever the folder lies; a repository's id stands for itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    found = blake2b(digest_size=8)
    for path in sorted(path for kind in ("*.json", "*.safetensors") for path in folder.rglob(kind)):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_READ, size // _PLACES)):
                file.seek(start)
                found.update(file.read(_READ))
    return found.hexdigest()


def load(source: str, **keywords: Any) -> Any:
    """`load_pipeline`, as comparisons run it: on the GPU if there is one, and silently.

    On a CPU a VAE that convolves in three dimensions is kept in float32: in bf16, where the processor has no instructions for
    it, such a convolution takes 300 times as long. The pipelines of such VAEs (Qwen-Image, LTX-2) decode in its dtype.
    """
    cuda = torch.cuda.is_available()
    pipe = load_pipeline(source, **keywords, **({"device_map": "cuda"} if cuda else {}))
    if not cuda and any(isinstance(module, nn.Conv3d) for module in pipe.vae.modules()):
        pipe.vae.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe: Any, source: str, prompts: Mapping[int, str], call: Mapping[str, Any]) -> list[Made]:
    """Runs the pipeline once for all of `prompts`, which are numbered; a number is the seed of its noise."""
    texts, steps = list(prompts.values()), []
    asked = GenerateOptions(source, texts[0], Path(), call=dict(call), seed=next(iter(prompts)))
    arguments = {**call_arguments(pipe, asked), "output_type": "np"}
    if len(texts) > 1:
        generators = [torch.Generator("cpu").manual_seed(number) for number in prompts]
        arguments |= {"prompt": list(texts), "generator": generators}
        arguments |= {name: [arguments[name]] * len(texts) for name in _REPEATED if isinstance(arguments.get(name), str)}

    def keep(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"].detach().float().cpu().clone())
        return {}

    result = pipe(**arguments, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"])
    return [
        Made(pictures_of(result, place), [step[place] for step in steps], _sound_of(result, place)) for place in range(len(texts))
    ]


def _sound_of(result: Any, place: int) -> Tensor | None:
    sounds = getattr(result, "audio", None)
    return None if sounds is None else torch.as_tensor(sounds[place]).float().cpu().clone()


def pictures_of(result: Any, place: int = 0) -> list[np.ndarray]:
    """The picture of a result, or frames of its clip, as [H, W, 3] uint8."""
    if hasattr(result, "images"):
        found = np.asarray(result.images[place : place + 1])
        found = found.reshape(-1, *found.shape[-3:])  # layered pipelines return several pictures of one prompt
    else:
        frames = np.asarray(result.frames[place])
        found = frames[np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int)]
    return [(np.clip(picture, 0, 1) * 255).round().astype(np.uint8) for picture in found]


def batches(prompts: Sequence[str], size: int) -> Iterator[dict[int, str]]:
    """The prompts by number, at most `size` at a time."""
    numbered = list(enumerate(prompts))
    for start in range(0, len(numbered), size):
        yield dict(numbered[start : start + size])
