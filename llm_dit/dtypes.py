"""In which dtype each component of a pipeline is loaded, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torchao.utils import TorchAOBaseTensor

from .checkpoints.header import read_header
from .names import nearest
from .request import LoadRequest
from .saved import was_layerwise

COMPUTE_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SAVED: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_OURS: Final = ("torchao", "llm_dit")
""" `quant_method` in config.json."""


def load_dtypes(kwargs: Mapping[str, Any], components: Iterable[str]) -> dict[str, torch.dtype]:
    """The dtype of each component that `torch_dtype` or `dtype` names, and "default", that of the others: bfloat16 unless given.

    Raises:
        ValueError: for what is no dtype that a model computes in, or a component that there is not.
    """
    given = _given(kwargs)
    if given is None:
        given = torch.bfloat16
    dtypes = {"default": torch.bfloat16, **given} if isinstance(given, Mapping) else {"default": given}
    valid = ("default", *components)
    for name, dtype in dtypes.items():
        if name not in valid:
            raise ValueError(f"torch_dtype names {name!r}, which this pipeline has not: {nearest(name, valid)}")
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch_dtype must be a torch.dtype or a mapping of them with quantization, not {given!r}")
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"torch_dtype={dtype} is nothing that a model computes in: give torch.bfloat16, and say with quantization= what "
                "its weights are stored in, e.g. 'fp8-weight-only'"
            )
    return dtypes


def in_dtypes(
    request: LoadRequest, kwargs: dict[str, Any], components: Iterable[str], saved: Mapping[str, torch.dtype]
) -> LoadRequest:
    """The request with the dtype of every component, which `kwargs` then gives diffusers too, whose default is float32.

    Args:
        saved: by component, what it was saved quantized in, where that is known; it is the default then.

    Raises:
        ValueError: as `load_dtypes` and `check_saved_dtypes`.
    """
    given, dtypes, notes = _given(kwargs), load_dtypes(kwargs, components), request.notes
    if given is None and saved:
        dtypes = _as_saved(saved)
        notes = (*notes, f"torch_dtype was not given: loaded in {_listed(dtypes)}, as it was saved")
    elif given is None:
        notes = (*notes, "torch_dtype was not given: loaded in bfloat16")
    elif isinstance(given, Mapping) and "default" not in given:
        notes = (*notes, "torch_dtype names no 'default': what it does not name is loaded in bfloat16")
    kwargs.pop("torch_dtype", None)
    kwargs["dtype"] = dtypes if len(dtypes) > 1 else dtypes["default"]
    request = replace(request, dtypes=dtypes, notes=notes)
    check_saved_dtypes(saved, request)
    return request


def _as_saved(saved: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    default = saved.get("transformer", next(iter(saved.values())))
    return {"default": default, **{name: dtype for name, dtype in saved.items() if dtype != default}}


def _listed(dtypes: Mapping[str, torch.dtype]) -> str:
    words = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    return ", ".join([words.pop("default"), *(f"{name} {word}" for name, word in words.items())])


def read_saved_dtypes(source: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.dtype]:
    """What components of a folder compute in that were saved quantized by torchao's quantizer or ours, from their files' headers.

    Nothing is known of a repository's before it is downloaded.

    Args:
        configs: by component, its config.json.
    """
    found = {name: _plain_dtype(Path(source) / name) for name, config in configs.items() if _is_ours(config)}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _is_ours(config: Mapping[str, Any]) -> bool:
    return was_layerwise(config) or (config.get("quantization_config") or {}).get("quant_method") in _OURS


def _plain_dtype(folder: Path) -> torch.dtype | None:
    """Of what is not quantized: scales may be float32 beside it."""
    entries = [entry for file in sorted(folder.glob("*.safetensors")) for entry in read_header(file).tensors.items()]
    dtypes = {entry.dtype for name, entry in entries if not name.endswith("scale")}
    return next((dtype for name, dtype in _SAVED.items() if name in dtypes), None)


def saved_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that the quantized weights of `model` compute in, or None without such weights of torchao's kind."""
    return next((weight.dtype for weight in model.parameters() if isinstance(weight, TorchAOBaseTensor)), None)


def check_saved_dtypes(saved: Mapping[str, torch.dtype], request: LoadRequest) -> None:
    """Raises ValueError if a component was saved quantized in another dtype than it is loaded in, with what to give instead.

    Its biases and norms are in the latter, with which some layers fail; int8 made for bfloat16 overflows float16.

    Args:
        saved: by component name, what its quantized weights compute in.
    """
    wrong = next((name for name, dtype in saved.items() if dtype != request.dtype_of(name)), None)
    if wrong is None:
        return
    dtypes = _as_saved(saved)
    advice = dtypes if len(dtypes) > 1 else dtypes["default"]
    raise ValueError(
        f"{wrong} was quantized in {saved[wrong]} when it was saved, and would be loaded in {request.dtype_of(wrong)}: give "
        f"torch_dtype={advice}, or quantize the unquantized weights in {request.dtype_of(wrong)}"
    )


def check_vae_dtype(family: str, vae: Any, transformer: Any) -> None:
    """Raises ValueError where the pipelines of a family hand latents to a VAE of another dtype as they are."""
    if vae is not None and transformer is not None and vae.dtype != transformer.dtype:
        raise ValueError(
            f"the VAE is {vae.dtype} and the transformer {transformer.dtype}, and {family} hands latents to its VAE "
            "as they are: load both in one dtype"
        )


def _given(kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("dtype") if kwargs.get("dtype") is not None else kwargs.get("torch_dtype")
