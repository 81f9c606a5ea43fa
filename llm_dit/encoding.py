"""Encoding prompts first, and then freeing what encoded them: the peak is the larger of the two halves, and not their sum."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import nn

from .loader import models_of
from .moving import move_models
from .names import format_bytes
from .quantization.hardware import current_device
from .quantization.sizes import model_bytes

if TYPE_CHECKING:
    from .families.base import Family


class EncodingMixin(DiffusionPipeline):
    """Before a diffusers pipeline in the bases."""

    family: ClassVar[Family]
    _dropped: tuple[str, ...]

    def _note(self, about: str, notes: list[str]) -> None:
        raise NotImplementedError

    def encode_then_free(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        *,
        device: str | torch.device | None = None,
        drop: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Encodes a prompt, frees the text encoder from the device, and moves the rest there.

        Args:
            prompt: as the pipeline's call takes it.
            negative_prompt: for guidance; if there is none, what the pipeline itself takes then.
            device: where to encode and generate; the GPU where there is one.
            drop: free the text encoder's host memory too; the pipeline cannot encode afterwards.
            **kwargs: for the pipeline's `encode_prompt`, e.g. `max_sequence_length`, or an image that the encoder sees.

        Returns:
            Keyword arguments of the call, in the place of the prompts. Encode several prompts as one list, or before `drop`.

        Raises:
            ValueError: if the pipeline is offloaded or has no text encoder.

        Example:
            >>> pipe = load_pipeline(folder, quantization="fp8-dynamic")  # on the host
            >>> picture = pipe(**pipe.encode_then_free("a cat")).images[0]
        """
        encoding, place = self.family.encoding, torch.device(device) if device else current_device()
        models = models_of(self)
        encoders = {name: models[name] for name in encoding.encoders if name in models}
        self._check_encoders(encoders, models)
        others = [model for name, model in models.items() if name not in encoders]
        if place.type == "cuda":  # where a call before this one has left them
            move_models(others, torch.device("cpu"))
            torch.cuda.empty_cache()
        move_models(encoders.values(), place)
        with torch.no_grad():
            arguments = self._encoded(prompt, negative_prompt, place, kwargs)
        move_models(encoders.values(), torch.device("cpu"))
        if drop:
            self.register_modules(**dict.fromkeys(encoders))
            self._dropped = tuple(encoders)
        self._note("encoding", [_told(name, model, place, drop) for name, model in encoders.items()])
        del encoders, models
        if place.type == "cuda":
            torch.cuda.empty_cache()
        move_models(others, place)
        return arguments

    def _check_encoders(self, encoders: dict[str, nn.Module], models: dict[str, nn.Module]) -> None:
        missing = [name for name in self.family.encoding.encoders if name not in encoders]
        if missing or not hasattr(self, "encode_prompt"):
            raise ValueError(f"{type(self).__name__} has no {' and '.join(missing) or 'prompt'} to encode with")
        hooked = [name for name, model in models.items() if hasattr(model, "_hf_hook") or _is_group_offload_enabled(model)]
        if hooked:
            raise ValueError(
                f"{', '.join(hooked)} is offloaded, which moves the models itself: use either offloading or encode_then_free"
            )

    def _encoded(self, prompt: Any, negative_prompt: Any, device: torch.device, kwargs: dict[str, Any]) -> dict[str, Any]:
        encoding = self.family.encoding
        negative = encoding.negative if negative_prompt is None else negative_prompt
        if isinstance(negative, str) and isinstance(prompt, list):
            negative = [negative] * len(prompt)
        if encoding.together:
            both = {"negative_prompt": negative, "do_classifier_free_guidance": negative is not None}
            found = dict(zip(encoding.outputs, self.encode_prompt(prompt, device=device, **both, **kwargs), strict=True))
        else:
            found = dict(zip(encoding.outputs, self.encode_prompt(prompt, device=device, **kwargs), strict=True))
            if negative is not None:
                values = self.encode_prompt(negative, device=device, **kwargs)
                found.update({f"negative_{name}": value for name, value in zip(encoding.outputs, values, strict=True)})
        taken = signature(self.__call__).parameters
        return {name: value for name, value in found.items() if name is not None and name in taken and value is not None}


def _told(name: str, model: nn.Module, device: torch.device, drop: bool) -> str:
    where = "dropped" if drop else "kept on the host"
    return f"{name}: {format_bytes(model_bytes(model))} freed from {device} after encoding, {where}"
