"""The tiny models that are shipped trained: whole pipelines in bf16, which draw what captions of scenes say.

`python -m llm_dit.tiny.training NAME` makes them again; docs/tiny-models.md says what they can do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..names import check_name

FOLDER: Final = Path(__file__).parent / "models"


def trained_names() -> tuple[str, ...]:
    """The models that are there."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/model_index.json")))


def trained(name: str) -> Path:
    """The folder of a trained model, which `load_pipeline` and every command take.

    Raises:
        ValueError: if there is none of that name.
    """
    check_name(name, trained_names(), "trained model")
    return FOLDER / name
