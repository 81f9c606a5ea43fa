"""What a pipeline folder or a checkpoint file holds, from configurations and headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoints.header import Header, read_header


def inspect_path(path: str | Path) -> dict[str, Any]:
    """A description of a pipeline folder or a .safetensors file, as plain dicts.

    Raises:
        ValueError: if it is neither.
    """
    place = Path(path)
    if place.is_file():
        return {"kind": "file", "path": str(place), **describe_header(read_header(place))}
    index = place / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{str(place)!r} is neither a safetensors file nor a folder with a model_index.json")
    entries = json.loads(index.read_text(encoding="utf-8"))
    components = {
        name: _component(place / name, entry[1])
        for name, entry in entries.items()
        if isinstance(entry, list) and entry[1] is not None
    }
    return {
        "kind": "pipeline",
        "path": str(place),
        "pipeline_class": entries.get("_class_name"),
        "components": components,
    }


def describe_header(header: Header) -> dict[str, Any]:
    """Counts, bytes by dtype and metadata keys of one header."""
    return {
        "tensors": len(header.tensors),
        "bytes": header.nbytes,
        "bytes_by_dtype": header.dtypes(),
        "metadata": sorted(key for key in header.metadata if key not in header.tensors),
    }


def _component(folder: Path, class_name: str) -> dict[str, Any]:
    described: dict[str, Any] = {"class_name": class_name}
    config_file = folder / "config.json"
    if not config_file.is_file():
        return described
    config = json.loads(config_file.read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    if quantization:
        described["quantization"] = _saved_method(quantization)
    elif config.get("_llm_dit_layerwise") or config.get("llm_dit_layerwise"):
        described["quantization"] = "fp8, layerwise casting"
    headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
    described["files"] = len(headers)
    described["bytes"] = sum(header.nbytes for header in headers)
    by_dtype: dict[str, int] = {}
    for header in headers:
        for dtype, nbytes in header.dtypes().items():
            by_dtype[dtype] = by_dtype.get(dtype, 0) + nbytes
    described["bytes_by_dtype"] = by_dtype
    return described


def _saved_method(quantization: dict[str, Any]) -> str:
    """How a saved quantization_config names itself: our method, torchao's configuration, or the library."""
    library = str(quantization.get("quant_method"))
    if "method" in quantization:
        return f"{quantization['method']} ({library})"
    kind = quantization.get("quant_type", {})
    name = kind.get("default", {}).get("_type") if isinstance(kind, dict) else kind
    return f"{library} {name}" if name else library
