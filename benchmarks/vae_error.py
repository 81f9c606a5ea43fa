"""How near the int8 VAEs of the trained tiny models come to their VAEs: PSNR in dB, both computing in float32, on the CPU.

    python benchmarks/vae_error.py

On the photographs and drawn scenes that the tests hold to 40 dB; beside it, with every weight rounded for itself.
"""

from collections.abc import Callable

import numpy as np
import torch
from skimage import data
from torch import Tensor, nn

from llm_dit import load_pipeline
from llm_dit.bench.picture_metrics import psnr
from llm_dit.quantization import quantize_vae
from llm_dit.tiny import scenes
from llm_dit.tiny.trained import trained, trained_names


def photographs() -> list[np.ndarray]:
    return [picture[40:296, 80:336] for picture in (data.astronaut(), data.coffee(), data.chelsea())]


def drawn_scenes() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [scenes.draw(scenes.sample(generator), generator) for _ in range(4)]


def round_alone(vae: nn.Module) -> None:
    for module in vae.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            weight = module.weight.data
            scale = weight.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (weight.ndim - 1)) / 127
            module.weight.data = (weight / scale).round() * scale


def as_bytes(picture: Tensor) -> np.ndarray:
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().flatten(1).T.numpy()[:, None]


@torch.inference_mode()
def nearness(name: str, quantize: Callable[[nn.Module], object], pictures: list[np.ndarray]) -> str:
    vae = load_pipeline(trained(name), torch_dtype=torch.float32).vae
    frames = [torch.from_numpy(picture / 127.5 - 1).float().movedim(-1, 0)[None] for picture in pictures]
    if any(isinstance(module, nn.Conv3d) for module in vae.modules()):
        frames = [frame.unsqueeze(2) for frame in frames]
    latents = [vae.encode(frame).latent_dist.mean for frame in frames]
    wanted = [vae.decode(latent).sample[0] for latent in latents]
    quantize(vae)
    found = [vae.decode(latent).sample[0] for latent in latents]
    return ", ".join(f"{psnr(as_bytes(one), as_bytes(other)):.1f}" for one, other in zip(wanted, found, strict=True))


def main() -> None:
    ways: dict[str, Callable[[nn.Module], object]] = {
        "rounded alone": round_alone,
        "`int8`": lambda vae: quantize_vae(vae, "int8"),
    }
    print("| VAE | | photographs | drawn scenes |\n|---|---|---|---|")
    for name in trained_names():
        for way, quantize in ways.items():
            cells = (nearness(name, quantize, pictures) for pictures in (photographs(), drawn_scenes()))
            print(f"| {name} | {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
