"""What is trained on, with its captions, drawn by all cores into files that every course reads."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import scenes
from ..scenes.clips import FRAMES, SAMPLES
from ..scenes.drawing import SIDE

_COPIED: Final = 1 << 28
"""Bytes that are brought onto a device at once."""


@dataclass(frozen=True)
class Subject:
    """A kind of scenes.

    Attributes:
        captions: what the file of the captions is called.
        arrays: what is drawn of one scene, by the name of its file: shape and type.
        draw: the caption of a scene that is not held out, and its arrays in their order.
        chunk: how many scenes are drawn at once.
        count: how many are drawn if nothing else is asked for.
    """

    captions: str
    arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]
    draw: Callable[[np.random.Generator], tuple[str, tuple[np.ndarray, ...]]]
    chunk: int
    count: int


@dataclass(frozen=True)
class Drawn:
    """Arrays [N, ...] of scenes by name, mapped from their files, and the scenes' captions."""

    arrays: Mapping[str, np.ndarray]
    captions: list[str]

    def on(self, name: str, device: torch.device) -> Tensor:
        """An array on a device; 131,072 pictures are 6.4 GB, 16,384 clips 13.7 GB."""
        array = self.arrays[name]
        whole = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, device=device)
        step = max(1, _COPIED // array[0].nbytes)
        for start in range(0, len(array), step):
            whole[start : start + step] = torch.from_numpy(np.array(array[start : start + step]))
        return whole


def to_float(drawn: Tensor) -> Tensor:
    """[B, ..., 3] uint8 -> [B, 3, ...] float32 in -1..1."""
    return drawn.movedim(-1, 1).float() / 127.5 - 1


def to_bytes(found: Tensor) -> np.ndarray:
    """[B, 3, ...] in -1..1 -> [B, ..., 3] uint8, on the host."""
    return ((found.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()


def draw_all(folder: Path, count: int, subject: Subject) -> Drawn:
    """`count` scenes that are not held out, drawn into `folder` or found there."""
    folder.mkdir(parents=True, exist_ok=True)
    files, captions = (
        {name: folder / f"{name}-{count}.npy" for name in subject.arrays},
        folder / f"{subject.captions}-{count}.json",
    )
    if not captions.is_file():
        partial = {name: folder / f".{name}-{count}-{os.getpid()}.npy" for name in files}
        try:
            found = _draw_chunks(partial, count, subject)
            for name, file in files.items():
                partial[name].replace(file)
        finally:
            for file in partial.values():
                file.unlink(missing_ok=True)
        written = captions.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(found), encoding="utf-8")
        written.replace(captions)
    mapped = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
    return Drawn(mapped, json.loads(captions.read_text(encoding="utf-8")))


def _draw_chunks(files: Mapping[str, Path], count: int, subject: Subject) -> list[str]:
    """Draws all scenes into new files; returns the captions."""
    for name, (shape, kind) in subject.arrays.items():
        np.lib.format.open_memmap(files[name], mode="w+", dtype=kind, shape=(count, *shape))
    draw = functools.partial(_draw, subject, list(files.values()))
    chunks = range(-(-count // subject.chunk))
    # A process that has used a GPU cannot be forked; one that has not need not import torch again in every worker.
    with get_context("spawn" if torch.cuda.is_initialized() else "fork").Pool() as pool:
        bar = tqdm(pool.imap(draw, chunks), f"Drawing {', '.join(files)}", len(chunks), unit="chunk")
        return [text for texts in bar for text in texts]


def _draw(subject: Subject, files: list[Path], chunk: int) -> list[str]:
    """Draws a chunk into its place in the files, whose arrays have their final sizes; returns the captions."""
    arrays = [np.load(file, mmap_mode="r+") for file in files]
    generator = np.random.default_rng((1, chunk))
    start = chunk * subject.chunk
    captions: list[str] = []
    for index in range(start, min(start + subject.chunk, len(arrays[0]))):
        caption, drawn = subject.draw(generator)
        captions.append(caption)
        for array, one in zip(arrays, drawn, strict=True):
            array[index] = one
    return captions


def _picture(generator: np.random.Generator) -> tuple[str, tuple[np.ndarray, ...]]:
    while scenes.held_out(scene := scenes.sample(generator)):
        pass
    return scene.caption, (scenes.draw(scene, generator),)


def _clip(generator: np.random.Generator) -> tuple[str, tuple[np.ndarray, ...]]:
    while scenes.clip_held_out(clip := scenes.sample_clip(generator)):
        pass
    return clip.caption, (scenes.draw_clip(clip, generator), scenes.draw_tone(clip, generator))


PICTURES: Final = Subject("captions", {"pictures": ((SIDE, SIDE, 3), np.uint8)}, _picture, chunk=512, count=131072)
CLIPS: Final = Subject(
    "clip-captions",
    {"clips": ((FRAMES, SIDE, SIDE, 3), np.uint8), "sounds": ((SAMPLES,), np.int16)},
    _clip,
    chunk=32,
    count=16384,
)
