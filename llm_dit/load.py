"""`load_pipeline`: the right class for a folder or repository, chosen from its model_index.json."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .families import quantizable_class

if TYPE_CHECKING:
    from .mixin import QuantizablePipelineMixin


def load_pipeline(pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> QuantizablePipelineMixin:
    """Loads a pipeline of any family, quantizing its components as they are read.

    Args:
        pretrained_model_name_or_path: a folder, or a repository on the Hub.
        **kwargs: as `QuantizablePipelineMixin.from_pretrained` takes them.

    Raises:
        ValueError: if there is no model_index.json, or it names a pipeline that no family covers.
    """
    return pipeline_class_of(pretrained_model_name_or_path, **kwargs).from_pretrained(pretrained_model_name_or_path, **kwargs)


def pipeline_class_of(source: str | PathLike[str], **kwargs: Any) -> type[QuantizablePipelineMixin]:
    """Our class for the pipeline that `source` holds; of `kwargs`, those that find files on the Hub are read."""
    from .arguments import hub_keywords
    from .loader import read_json
    from .saving import refuse_unfinished

    refuse_unfinished(str(source))
    index = read_json(str(source), "model_index.json", hub_keywords(kwargs)) if not Path(source).is_file() else {}
    if "_class_name" not in index:
        raise ValueError(_no_pipeline(str(source)))
    return quantizable_class(index["_class_name"])


def _no_pipeline(source: str) -> str:
    """Why nothing was found under that name."""
    from .loader import names_repository

    if Path(source).is_file():
        return (
            f"{source!r} is a file, and a pipeline is a folder: give the folder or repository of its pipeline, and the file as "
            "transformer_file or encoder_file"
        )
    if Path(source).is_dir():
        return f"{source!r} holds no model_index.json of a diffusers pipeline: give the folder that save_pretrained wrote"
    if names_repository(source):
        return (
            f"there is no folder {source!r} here, and the Hub gave no model_index.json of a repository of that name: check the "
            "name and the network, or download it first where there is none"
        )
    return f"there is no folder {source!r}: give the one that save_pretrained wrote, or owner/repository on the Hub"
