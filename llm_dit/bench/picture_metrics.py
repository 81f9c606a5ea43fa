"""How far a picture is from another: PSNR, SSIM and FLIP, from the libraries that define them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

MOST_DB: Final = 100.0
"""What stands for infinity, which JSON does not have."""


def require_metrics() -> None:
    """Raises ValueError, saying what to install, where a library is missing."""
    missing = [name for name in ("skimage", "flip_evaluator") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"comparing pictures needs {' and '.join(missing)}: pip install 'llm-dit[quality]'")


def psnr(reference: np.ndarray, picture: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of two pictures [H, W, 3] uint8; `MOST_DB` if they are equal."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(reference, picture):
        return MOST_DB
    return min(float(peak_signal_noise_ratio(reference, picture)), MOST_DB)


def ssim(reference: np.ndarray, picture: np.ndarray) -> float:
    """Structural similarity, 1 if they are equal (Wang et al., 2004)."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(reference, picture, channel_axis=-1))


def flip(reference: np.ndarray, picture: np.ndarray) -> float:
    """Mean of NVIDIA's FLIP: the difference that is seen when flipping between the two, 0 to 1 (Andersson et al., 2020)."""
    import flip_evaluator

    left, right = (image.astype(np.float32) / 255 for image in (reference, picture))
    return float(flip_evaluator.evaluate(left, right, "LDR", applyMagma=False)[1])


METRICS: Final[Mapping[str, Callable[[np.ndarray, np.ndarray], float]]] = {"psnr": psnr, "ssim": ssim, "flip": flip}
