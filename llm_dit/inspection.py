"""What a pipeline folder or a checkpoint file holds, from configurations and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints.header import Header, read_header
from .checkpoints.layout import FORMAT_TENSOR, Layout, read_layout, saved_classes
from .checkpoints.recognize import Kind, recognize
from .saved import was_layerwise
from .writing import read_json_file

_CONFIG = "config.json"
_EMBEDDING = "embed_tokens.weight"
"""What every text encoder calls its embedding, a matrix that is looked up and not multiplied."""


def inspect_path(path: str | Path) -> dict[str, Any]:
    """A description of a pipeline folder or a .safetensors file, as plain dicts.

    Raises:
        ValueError: if it is neither.
    """
    place = Path(path)
    if place.is_file():
        return {"kind": "file", "path": str(place), **describe_file(read_header(place))}
    if not place.exists():
        raise ValueError(f"there is no file or folder {str(place)!r}: give a pipeline folder or a .safetensors file")
    index = place / "model_index.json"
    if not index.is_file() and (place / _CONFIG).is_file():
        return {"kind": "component", "path": str(place), **_component(place, _class_name(place))}
    if not index.is_file():
        raise ValueError(f"{str(place)!r} is neither a safetensors file nor a folder with a model_index.json or config.json")
    entries = read_json_file(index)
    components = {
        name: _component(place / name, entry[1])
        for name, entry in entries.items()
        if isinstance(entry, list) and entry[1] is not None
    }
    return {
        "kind": "pipeline",
        "path": str(place),
        "pipeline_class": entries.get("_class_name"),
        "loading": _folder_loading(components),
        "components": components,
    }


def _folder_loading(components: Mapping[str, Mapping[str, Any]]) -> str:
    """What the loader would do with a pipeline folder."""
    saved = [f"{name} in {component['quantization']}" for name, component in components.items() if "quantization" in component]
    if not saved:
        return "load_pipeline(PATH, quantization=METHOD) quantizes it while it is read"
    return f"load_pipeline(PATH) loads it as it was saved, {', '.join(saved)}; another method needs the bf16 weights"


def describe_file(header: Header) -> dict[str, Any]:
    """What a checkpoint file is and what the loader would do with it, or why it would refuse it."""
    kind = recognize({*header.tensors, *header.metadata})  # where torchao keeps the names of what it takes apart
    holds = kind.title if kind else _class_name(header.path.parent) or "nothing that llm_dit knows"
    described = {"holds": holds, **describe_header(header)}
    try:
        saved = ", ".join(f"{len(names)} weights as {name}" for name, names in saved_classes(header).items())
        if saved:
            return {**described, "layout": f"torchao: {saved}", "loading": "load_pipeline(the folder of its pipeline)"}
        layout = read_layout(header)
    except ValueError as error:
        return {**described, "layout": "not supported", "loading": f"refused: {error}"}
    kept = [key for key in layout.fp8 if layout.stays_fp8(key) and not key.endswith(_EMBEDDING)]
    dequantized = [key for key in layout.fp8 if key not in kept]
    scales = [header.tensors[weight.scale].elements for weight in layout.fp8.values() if weight.scale]
    described |= {
        "layout": layout.title,
        "prefix": layout.prefix,
        "fp8_weights": len(layout.fp8),
        "stays_fp8": len(kept),
        "dequantized": dequantized,
        "scales_per_tensor": sum(count == 1 for count in scales),
        "scales_per_row": sum(count > 1 for count in scales),
        "input_scales": sum(weight.input_scale is not None for weight in layout.fp8.values()),
        "other_components": _other_components(layout),
        "ignored": [key for key in layout.ignored if not key.endswith(FORMAT_TENSOR)],
    }
    return {**described, "loading": _loading(kind, kept, dequantized, layout)}


def _other_components(layout: Layout) -> list[str]:
    starts = {"vae.": "vae", "audio_vae.": "audio_vae", "vocoder.": "vocoder", "text_embedding_projection.": "connectors"}
    return [name for start, name in starts.items() if any(key.startswith(start) for key in layout.weights)]


def _loading(kind: Kind | None, kept: list[str], dequantized: list[str], layout: Layout) -> str:
    argument = "encoder_file" if kind is not None and not kind.family else "transformer_file"
    if kind is None:
        return "refused: it is no transformer of FLUX.2, LTX-2, Z-Image or Qwen-Image, and no text encoder"
    if not layout.fp8:
        return f"{argument}: read in 16 bits, or quantized while it is read with the method that is asked for"
    words = f"{argument}: {len(kept)} weights stay in fp8, byte for byte"
    if dequantized:
        words += f"; {len(dequantized)} are dequantized (biases, norms, embeddings, e5m2, dimensions not divisible by 16)"
    if layout.static:
        words += "; activation_scale='static' would use its input scales"
    return words


def describe_header(header: Header) -> dict[str, Any]:
    """Counts, bytes by dtype and metadata keys of one header."""
    return {
        "tensors": len(header.tensors),
        "bytes": header.nbytes,
        "bytes_by_dtype": header.dtypes(),
        "metadata": sorted(key for key in header.metadata if key not in header.tensors),
    }


def _class_name(folder: Path) -> str:
    """What class of diffusers or transformers a component's folder says it is of, or ""."""
    config = read_json_file(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    return config.get("_class_name") or next(iter(config.get("architectures") or ()), "")


def _component(folder: Path, class_name: str) -> dict[str, Any]:
    described: dict[str, Any] = {"class_name": class_name}
    config_file = folder / _CONFIG
    if not config_file.is_file():
        return described
    config = read_json_file(config_file)
    quantization = config.get("quantization_config")
    if quantization:
        described["quantization"] = _saved_method(quantization)
    elif was_layerwise(config):
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
