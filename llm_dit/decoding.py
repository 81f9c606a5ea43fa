"""A VAE that tiles when its decode would not fit: of a VAE the activations are the memory, and not the weights.

Before each decode its peak is counted (`peak_activation_bytes`) on a twin without memory and compared with what the device has
free. If it does not fit, the batch is sliced and the picture tiled by the largest tile that does. Where tiling was turned on by
hand it stays as it was set.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .building import default_dtype
from .names import format_bytes
from .quantization.activations import peak_activation_bytes

logger = logging.getLogger(__name__)
TILES: Final = (2048, 1536, 1024, 768, 512, 384, 256)
"""Sides of a tile in pixels, multiples of every VAE's compression; below 256 the seams show more than the picture."""
_OVERLAP: Final = 0.25
WORKSPACE: Final = int(1.1 * 1024**3)
"""What cuDNN takes beside the activations: on an H200 in bfloat16, FLUX.2's VAE at 1024 and 2048 px and Qwen-Image's at 1024 px
peaked 0.91, 1.04 and 0.78 GiB above their weights and what is counted."""


@dataclass(frozen=True)
class Cut:
    """How a decode is cut: batch entries one by one, tiles of so many pixels (0: none), and frames by groups."""

    sliced: bool = False
    tile: int = 0
    framewise: bool = False

    def __str__(self) -> str:
        words = ["one by one"] if self.sliced else []
        words += [f"in tiles of {self.tile} px"] if self.tile else []
        words += ["group of frames by group"] if self.framewise else []
        return ", ".join(words) or "whole"


WHOLE: Final = Cut()


class FittedDecode:
    """Stands in the place of `vae.decode`.

    Attributes:
        told: what was cut and why, a line for each size that did not fit.
    """

    def __init__(self, vae: nn.Module, free_bytes: Callable[[torch.device], int | None] | None = None) -> None:
        # Held weakly, because the VAE holds this.
        self._vae = weakref.ref(vae)
        self._free_bytes = free_bytes or free_device_bytes
        self._twin: Any = None
        self._side_ratio = 0
        self._counted: dict[tuple[Any, ...], int] = {}
        self.told: dict[tuple[int, ...], str] = {}

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        vae: Any = self._vae()
        if vae is None:
            raise RuntimeError("this decode was taken from a VAE that no longer exists: call the VAE's")
        decode = type(vae).decode.__get__(vae)
        if torch.compiler.is_compiling():
            return decode(z, *args, **kwargs)
        if hasattr(vae, "_hf_hook"):
            vae._hf_hook.pre_forward(vae)  # offloading makes room first
        free = self._free_bytes(z.device)
        if free is None or vae.use_tiling:
            return decode(z, *args, **kwargs)
        before = _settings(vae)
        try:
            self._fit(vae, free, z, args, kwargs)
        except Exception as error:  # a VAE that cannot be counted decodes as it would have
            logger.warning("how much memory the VAE's decode takes could not be counted: %s", error)
            vars(vae).update(before)
        try:
            return decode(z, *args, **kwargs)
        finally:
            vars(vae).update(before)

    def needed_bytes(self, z: Tensor, *args: Any, cut: Cut = WHOLE, **kwargs: Any) -> int:
        """What decoding `z` takes beside the weights, cut so. One part is counted, once, and what is gathered of all."""
        key = (tuple(z.shape), z.dtype, cut)
        if key not in self._counted:
            self._counted[key] = self._count(z, args, kwargs, cut)
        return self._counted[key]

    def _count(self, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], cut: Cut) -> int:
        vae: Any = self._vae()
        if self._twin is None:
            with torch.device("meta"), default_dtype(vae.dtype):
                self._twin = type(vae).from_config(vae.config).eval()
        batch = 1 if cut.sliced else z.shape[0]
        side = cut.tile // _compression(vae) if cut.tile else max(z.shape)
        frames = _frames(vae) if cut.framewise else max(z.shape)
        part = z[:batch, :, :frames, :side, :side] if z.ndim == 5 else z[:batch, :, :side, :side]
        given, keywords = tree_map(lambda value: _beside(value, z.shape[0], batch), (args, kwargs))
        sizes: list[int] = []

        def decode() -> None:
            result = self._twin.decode(torch.empty_like(part, device="meta"), *given, **keywords)
            pictures = _tensors(result)
            sizes.extend(picture.untyped_storage().nbytes() for picture in pictures)
            self._side_ratio = pictures[0].shape[-1] // part.shape[-1]

        peak = peak_activation_bytes(decode)
        gathered = sum(sizes) * z.numel() // part.numel()
        # Tiles overlap (by 1.8 in area), and are blended and joined while all are still there; entries are joined at the end.
        tiled = 3 * gathered * batch // z.shape[0] if cut.tile else 0
        return max(peak + tiled + (gathered if cut.sliced else 0), 2 * gathered) + WORKSPACE

    def _fit(self, vae: Any, free: int, z: Tensor, args: Any, kwargs: Any) -> None:
        """Sets `vae` to the first way to cut that fits, or to the last."""
        chosen, needed, whole = WHOLE, 0, 0
        for cut in _cuts(vae, z):
            if cut.tile and self._side_ratio != _compression(vae):
                break  # a VAE whose configuration is wrong about it joins its tiles to a picture of another size
            needed = self.needed_bytes(z, *args, cut=cut, **kwargs)
            chosen, whole = cut, whole or needed
            if needed <= free:
                break
        apply_cut(vae, chosen)
        if chosen != WHOLE:
            told = (
                f"decoding {'x'.join(map(str, z.shape))} takes {format_bytes(whole)} and {format_bytes(free)} are free: "
                f"decoded {chosen}, which takes {format_bytes(needed)}"
            )
            if self.told.get(tuple(z.shape)) is None:
                logger.warning("the VAE: %s", told)
            self.told[tuple(z.shape)] = told

    def __getstate__(self) -> dict[str, Any]:
        return {"vae": self._vae(), "free_bytes": self._free_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["vae"], state["free_bytes"])  # type: ignore[misc]


def fit_decoding(vae: nn.Module, free_bytes: Callable[[torch.device], int | None] | None = None) -> None:
    """Makes a VAE that can tile do so when it must."""
    if hasattr(vae, "use_tiling") and hasattr(vae, "decode") and not isinstance(vae.decode, FittedDecode):
        fitted: Any = FittedDecode(vae, free_bytes)
        vae.decode = fitted


def told_of_decoding(model: nn.Module) -> list[str]:
    """What the report is to say of a VAE that was tiled."""
    decode = vars(model).get("decode")
    return list(decode.told.values()) if isinstance(decode, FittedDecode) else []


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a GPU, its own free cache included; None for anything else."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free, int(share * total) - reserved) + reserved - torch.cuda.memory_allocated(device)


def _cuts(vae: Any, z: Tensor) -> Iterator[Cut]:
    """Ways to cut, each finer than the one before."""
    yield WHOLE
    sliced = z.shape[0] > 1 and hasattr(vae, "use_slicing")
    if sliced:
        yield Cut(sliced=True)
    yield from (Cut(sliced, tile) for tile in TILES)
    if hasattr(vae, "use_framewise_decoding"):
        yield Cut(sliced, TILES[-1], framewise=True)


def _compression(vae: Any) -> int:
    """Pixels per latent, of a side."""
    return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)


def _frames(vae: Any) -> int:
    """Latent frames of a group."""
    return vae.tile_sample_min_num_frames // vae.temporal_compression_ratio + 1


def _beside(value: Any, batch: int, part: int) -> Any:
    """An argument beside the latents, for the first `part` entries of the batch, on meta."""
    if not torch.is_tensor(value):
        return None if isinstance(value, torch.Generator) else value
    cut = value[:part] if value.ndim and value.shape[0] == batch else value
    return torch.empty_like(cut, device="meta")


def _tensors(result: Any) -> list[Tensor]:
    leaves = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else (result,)
    return [leaf for leaf in leaves if torch.is_tensor(leaf)]


def apply_cut(vae: Any, cut: Cut) -> None:
    """Sets how a VAE cuts its decodes."""
    vae.use_slicing = cut.sliced
    vae.use_tiling = bool(cut.tile)
    if hasattr(vae, "use_framewise_decoding"):
        vae.use_framewise_decoding = cut.framewise
    if cut.tile and hasattr(vae, "tile_sample_min_size"):
        vae.tile_sample_min_size = cut.tile
        vae.tile_latent_min_size = cut.tile // _compression(vae)
        vae.tile_overlap_factor = _OVERLAP
    elif cut.tile:
        vae.tile_sample_min_height = vae.tile_sample_min_width = cut.tile
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = int(cut.tile * (1 - _OVERLAP))


def _settings(vae: Any) -> dict[str, Any]:
    """The attributes of a VAE that say how it cuts."""
    return {name: value for name, value in vars(vae).items() if name.startswith(("use_", "tile_"))}
