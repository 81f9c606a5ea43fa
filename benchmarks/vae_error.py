"""How near the int8 VAEs of the trained tiny models come to their VAEs: PSNR in dB, both computing in float32, on the CPU.

    python benchmarks/vae_error.py

On the photographs and drawn scenes that the tests hold to 40 dB; beside it, what int8 is chosen over.
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from skimage import data
from torch import Tensor, nn

from llm_dit import load_pipeline
from llm_dit.bench.picture_metrics import psnr
from llm_dit.quantization import quantize_vae
from llm_dit.tiny import scenes
from llm_dit.tiny.trained import trained, trained_names
from llm_dit.tiny.training.data import to_bytes, to_float


def photographs() -> list[np.ndarray]:
    return [picture[40:296, 80:336] for picture in (data.astronaut(), data.coffee(), data.chelsea())]


def drawn_scenes() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [scenes.draw(scenes.sample(generator), generator) for _ in range(4)]


def round_alone(weight: Tensor, largest: int) -> Tensor:
    """To whole numbers up to `largest`, with one scale per output channel."""
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (weight.ndim - 1)) / largest
    return (weight / scale).round() * scale


def with_weights(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], object]:
    def changed(vae: nn.Module) -> None:
        for module in vae.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                module.weight.data = change(module.weight.data)

    return changed


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "four bits, rounded alone": with_weights(lambda weight: round_alone(weight, 7)),
    "cast to fp8": with_weights(lambda weight: weight.to(torch.float8_e4m3fn).float()),
    "eight bits, rounded alone": with_weights(lambda weight: round_alone(weight, 127)),
    "`int8`": lambda vae: quantize_vae(vae, "int8"),
}


@torch.inference_mode()
def rows(name: str) -> Iterator[str]:
    """Of one model, a row of the table for every way to quantize."""
    original = load_pipeline(trained(name), torch_dtype=torch.float32).vae
    in_time = any(isinstance(module, nn.Conv3d) for module in original.modules())
    groups = []
    for pictures in (photographs(), drawn_scenes()):
        frames = [to_float(torch.from_numpy(picture[None, None] if in_time else picture[None])) for picture in pictures]
        latents = [original.encode(frame).latent_dist.mean for frame in frames]
        groups.append((latents, [to_bytes(original.decode(latent).sample) for latent in latents]))
    for way, quantize in WAYS.items():
        vae = copy.deepcopy(original)
        quantize(vae)
        cells = (
            ", ".join(f"{psnr(wanted, to_bytes(vae.decode(latent).sample)):.1f}" for latent, wanted in zip(*group, strict=True))
            for group in groups
        )
        yield f"| {name} | {way} | " + " | ".join(cells) + " |"


def main() -> None:
    print("| VAE | | photographs | drawn scenes |\n|---|---|---|---|")
    for name in trained_names():
        print("\n".join(rows(name)))


if __name__ == "__main__":
    main()
