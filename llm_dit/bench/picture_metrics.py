"""How far a picture is from another: PSNR, SSIM, FLIP and, where it is installed, LPIPS, from the libraries that define them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

MOST_DB: Final = 100.0
"""What stands for infinity, which JSON does not have."""
_ALEXNET: Final = "alexnet-owt-7be5be79.pth"
"""What torchvision calls the weights that LPIPS is defined on (`AlexNet_Weights.IMAGENET1K_V1`)."""


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


def has_lpips() -> bool:
    """If `lpips` is installed and AlexNet's weights are where torchvision keeps them: nothing is downloaded for it."""
    installed = all(importlib.util.find_spec(name) is not None for name in ("lpips", "torchvision"))
    return installed and (Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET).is_file()


def lpips(reference: np.ndarray, picture: np.ndarray) -> float:
    """Distance of AlexNet's features, 0 if they are equal (Zhang et al., 2018)."""
    with torch.inference_mode():
        left, right = (torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in (reference, picture))
        return float(_lpips_network()(left, right))


@cache
def _lpips_network() -> Any:
    from lpips import LPIPS  # type: ignore[import-not-found, unused-ignore]

    return LPIPS(net="alex", verbose=False).eval()


def metrics() -> Mapping[str, Callable[[np.ndarray, np.ndarray], float]]:
    """Those that this machine can compute, by name."""
    return {"psnr": psnr, "ssim": ssim, "flip": flip, **({"lpips": lpips} if has_lpips() else {})}
