"""Pictures and captions to train on, drawn by all cores into files that every course reads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import scenes
from ..scenes.drawing import SIDE

_CHUNK = 512


@dataclass(frozen=True)
class Drawn:
    """Pictures [N, 128, 128, 3] uint8, mapped from their file, and their captions."""

    pictures: np.ndarray
    captions: list[str]

    def on(self, device: torch.device) -> Tensor:
        """All pictures [N, 128, 128, 3] uint8 on a device, 6.4 GB for 131,072."""
        parts = (torch.from_numpy(np.array(self.pictures[start : start + 4096])) for start in range(0, len(self.pictures), 4096))
        return torch.cat([part.to(device) for part in parts])


def to_float(pictures: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_all(folder: Path, count: int) -> Drawn:
    """`count` scenes that are not held out, drawn into `folder` or found there."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, captions = folder / f"pictures-{count}.npy", folder / f"captions-{count}.json"
    if not captions.is_file():
        partial = folder / f".pictures-{count}-{os.getpid()}.npy"
        shape = (count, SIDE, SIDE, 3)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        found: list[str] = []
        sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
        # A process that has used a GPU cannot be forked; one that has not need not import torch again in every worker.
        with get_context("spawn" if torch.cuda.is_initialized() else "fork").Pool() as pool:
            for drawn, texts in tqdm(pool.imap(_draw, enumerate(sizes)), "Drawing scenes", len(sizes), unit="chunk"):
                array[len(found) : len(found) + len(texts)] = drawn
                found += texts
        array.flush()
        partial.replace(pictures)
        written = captions.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(found), encoding="utf-8")
        written.replace(captions)
    return Drawn(np.load(pictures, mmap_mode="r"), json.loads(captions.read_text(encoding="utf-8")))


def _draw(numbered: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    seed, size = numbered
    generator = np.random.default_rng((1, seed))
    pictures = np.empty((size, SIDE, SIDE, 3), np.uint8)
    captions: list[str] = []
    while len(captions) < size:
        scene = scenes.sample(generator)
        if not scenes.held_out(scene):
            pictures[len(captions)] = scenes.draw(scene, generator)
            captions.append(scene.caption)
    return pictures, captions
