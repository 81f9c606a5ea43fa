"""The LoRA methods of a pipeline, as diffusers has them, over quantized models."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..loader import names_repository
from ..names import first_line
from ..quantization.torchao_tensors.staging import staged
from .checking import check_lora, checked_against
from .loading import adopt_layers, fusing, fusing_notes, loading, require_peft


class QuantizedLoraMixin:
    """Before a diffusers pipeline in the bases; see the methods of the same names there."""

    _lora_loadable_modules: list[str]

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, beside quantized weights of any kind.

        Raises:
            ImportError: without peft.
            FileNotFoundError: for a path where nothing is.
            ValueError: for a file that is no LoRA, if most of it belongs to another model or is of another size, or if a weight
                is NaN or infinite. Nothing is loaded then.

        Where a few of its layers have no place in the pipeline, it warns, and the report says so.
        """
        require_peft()
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path_or_dict")
        if isinstance(source, str | PathLike) and not Path(source).exists() and not names_repository(str(source)):
            raise FileNotFoundError(f"there is no LoRA {str(source)!r}: give a file, a folder, or owner/repository on the Hub")
        models = self._lora_models()
        with loading(models, hotswap=bool(kwargs.get("hotswap"))), checked_against(models) as notes:
            self._diffusers("load_lora_weights")(*args, **kwargs)
        self._note("LoRA", notes)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """As in diffusers; what is loaded right then is compared with the models that it is for.

        Raises:
            ValueError: as in `load_lora_weights`.
        """
        source = pretrained_model_name_or_path_or_dict
        try:
            found = super().lora_state_dict(source, **kwargs)  # type: ignore[misc]
        except OSError as error:
            if isinstance(source, str | PathLike) and Path(source).exists():
                raise ValueError(f"{str(source)!r} cannot be read as a LoRA: {first_line(error)}") from error
            raise
        state = found[0] if isinstance(found, tuple) else found
        if not any("lora" in name or "lokr" in name for name in state):
            named = repr(str(source)) if isinstance(source, str | PathLike) else "what was given"
            raise ValueError(f"{named} is no LoRA: no name in it says lora or lokr, and the first is {next(iter(state), '')!r}")
        check_lora(state)
        return found

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; a quantized weight is dequantized or, where its checkpoint is still there, read again, added to and
        quantized in its own memory, one at a time. The report says which.

        Raises:
            ValueError: if a sum is not finite, or an adapter is more than a LoRA (DoRA).
        """
        require_peft()
        models = self._lora_models()
        for model in models.values():
            adopt_layers(model)  # of adapters that were loaded into the model and not through the pipeline
        with fusing(models.values()), staged():
            self._diffusers("fuse_lora")(*args, **kwargs)
        self._note("fusing", list(fusing_notes(models)))

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; quantized weights have the bits again that they had before `fuse_lora`."""
        require_peft()
        with staged():
            self._diffusers("unfuse_lora")(*args, **kwargs)
        self._note("fusing", list(fusing_notes(self._lora_models())))

    def _note(self, about: str, notes: list[str]) -> None:
        raise NotImplementedError

    def _lora_models(self) -> dict[str, nn.Module]:
        models = {name: getattr(self, name, None) for name in getattr(self, "_lora_loadable_modules", ())}
        return {name: model for name, model in models.items() if isinstance(model, nn.Module)}

    def _diffusers(self, method: str) -> Any:
        found = getattr(super(), method, None)
        if found is None:
            raise AttributeError(f"{type(self).__name__} takes no LoRAs: it has no model for them")
        return found
