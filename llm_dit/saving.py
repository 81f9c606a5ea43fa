"""Saving a quantized pipeline so that what is saved loads again, bit for bit, or is known not to be whole."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, Final

from diffusers import DiffusionPipeline
from torch import nn
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel
from transformers.integrations.torchao import TorchAoDeserialize

from .backends.saving import attach_plain_saver
from .checkpoints.encoders import PRUNED
from .loader import models_of, saved_method
from .names import CALL_FILE, format_bytes
from .quantization.report import QuantizationReport

INDEX: Final = "model_index.json"
UNFINISHED: Final = ".saving"
"""What is being saved lies in a folder of this name inside its own, and moves up when it is whole, the index last."""
_CARD: Final = "README.md"
_SECTION: Final = re.compile(r"<!-- llm-dit -->.*<!-- /llm-dit -->\n?", re.DOTALL)
_FRONT_MATTER: Final = "---\nlibrary_name: diffusers\n---\n\n"
_PACKAGES: Final = ("llm-dit", "torch", "torchao", "diffusers", "transformers")


class SavingMixin(DiffusionPipeline):
    """Before a diffusers pipeline in the bases; see the methods of the same names there."""

    _dropped: tuple[str, ...] = ()

    @property
    def quantization_report(self) -> QuantizationReport:
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers; what is saved loads again without quantizing, bit for bit, and names diffusers' class.

        A process that ends on the way leaves no folder that loads: what was there before, or one that is refused.

        Raises:
            NotADirectoryError: if there is a file of that name.
            ValueError: for a component that would not load again.
        """
        dropped = [name for name in self._dropped if getattr(self, name, None) is None]
        if dropped:
            raise ValueError(
                f"{', '.join(dropped)} was dropped after encoding, and a saved pipeline needs it: load the pipeline anew"
            )
        prepare_for_saving(models_of(self))
        target = Path(save_directory)
        if target.is_file():
            raise NotADirectoryError(f"{str(target)!r} is a file, and a pipeline is saved to a folder: give another name")
        if kwargs.get("is_main_process") is False:
            return  # another process writes the folder, and diffusers 0.42 would write all of it here too
        given = signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
        if given.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.absolute().name)
        with written_beside(target, given.get("variant")) as beside:
            super().save_pretrained(str(beside), *args, **kwargs)  # diffusers splits the name of a pushed one
            self._write_card(beside, target)
            source = Path(self.name_or_path or "", CALL_FILE)
            if source.is_file():
                shutil.copyfile(source, beside / CALL_FILE)

    def _upload_folder(self, working_dir: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """diffusers writes its model card over ours just before: the section is added to it."""
        self._write_card(Path(working_dir), Path(working_dir))
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _write_card(self, folder: Path, found_in: Path) -> None:
        """Writes README.md into `folder`: that of `found_in`, its section about quantization made new."""
        if all(report.method == "none" for report in self.quantization_report):
            return
        existing = folder if (folder / _CARD).is_file() else found_in
        text = (existing / _CARD).read_text(encoding="utf-8") if (existing / _CARD).is_file() else _FRONT_MATTER
        section = card_section(self.quantization_report, {name: saved_method(model) for name, model in models_of(self).items()})
        text = _SECTION.sub("", text).rstrip("\n") + "\n\n" + section
        (folder / _CARD).write_text(text.lstrip("\n"), encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"


def card_section(report: QuantizationReport, methods: Mapping[str, str | None]) -> str:
    """The section of a model card that says how a pipeline is quantized, by what, and what it takes.

    Args:
        methods: by component, the method that a saved model records; the report of one that came quantized does not.
    """
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    rows = [
        f"| {part.name} | {_method(part.method, methods.get(part.name))} | {format_bytes(part.bytes_after)} | "
        f"{format_bytes(part.bytes_before)} |"
        for part in report
    ]
    return "\n".join(
        (
            "<!-- llm-dit -->",
            "## Quantization",
            "",
            f"Saved with {versions}. Bytes are measured.",
            "",
            "| component | method | held | before |",
            "|---|---|---|---|",
            *rows,
            f"| total | | {format_bytes(report.bytes_after)} | {format_bytes(report.bytes_before)} |",
            "",
            "```python",
            "from llm_dit import load_pipeline",
            "",
            'pipe = load_pipeline("path or repository")  # as it was saved; nothing is quantized again',
            "```",
            "<!-- /llm-dit -->",
            "",
        )
    )


def _method(reported: str, saved: str | None) -> str:
    return saved or "quantized" if reported == "already_quantized" else reported


@contextmanager
def written_beside(target: Path, variant: str | None = None) -> Iterator[Path]:
    """A folder to write into, whose contents take their places in `target` when the block ends well.

    It lies inside `target`, so that a mounted folder is moved within and not copied. The index goes first and comes last: at no
    moment does it stand beside parts of another save. What else lies in `target` stays, but for the weights of the same variant.
    """
    target.mkdir(parents=True, exist_ok=True)
    beside = target / UNFINISHED
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    # From here on an error leaves what is not in its place yet, and a folder that says that it is not whole.
    (target / INDEX).unlink(missing_ok=True)
    for entry in sorted(beside.iterdir(), key=lambda entry: entry.name == INDEX):
        place = target / entry.name
        if place.is_symlink() or place.is_dir() != entry.is_dir():
            _remove(place)
        if entry.is_dir() and place.is_dir():
            _replace_weights(entry, place, variant)
        else:
            entry.replace(place)
    shutil.rmtree(beside)


def _replace_weights(new: Path, place: Path, variant: str | None) -> None:
    """Moves the files of a component into its folder, where the weights of `variant` that lie there go."""
    ending = re.escape(f".{variant}") if variant else ""
    weights = re.compile(rf"\w*model{ending}(-\d+-of-\d+)?\.(safetensors|bin)|\w*model\.(safetensors|bin)\.index{ending}\.json")
    for old in list(place.iterdir()):
        if weights.fullmatch(old.name):
            old.unlink()
    for file in list(new.iterdir()):
        if (place / file.name).is_dir() or (place / file.name).is_symlink():
            _remove(place / file.name)
        file.replace(place / file.name)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_unfinished(source: str) -> None:
    """Raises ValueError for a folder whose saving was interrupted."""
    folder = Path(source)
    if (folder / UNFINISHED).is_dir() and not (folder / INDEX).is_file():
        raise ValueError(f"{source!r} is not whole: the process that saved it ended on the way; save it again")


def prepare_for_saving(models: Mapping[str, nn.Module]) -> None:
    """Refuses what would write a broken folder, and mends what keeps a reloaded one from saving.

    Raises:
        ValueError: for a component with layers of a LoRA: its keys would be written in a form nothing reads.
    """
    for name, model in models.items():
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise ValueError(
                f"{name} has LoRA adapters loaded, and saving it now writes a folder that does not load: call "
                "unload_lora_weights(), or fuse_lora() and then unload_lora_weights(), before save_pretrained"
            )
        if getattr(model, PRUNED, ()):
            left_out = ", ".join(getattr(model, PRUNED))
            raise ValueError(
                f"{name} was loaded without {left_out}, which a saved folder needs: load the whole encoder to save it, from its "
                "repository and with encoder_layers='all'"
            )
        if getattr(model, "hf_quantizer", None) is None and any(isinstance(p, TorchAOBaseTensor) for p in model.parameters()):
            attach_plain_saver(model)
        if isinstance(model, PreTrainedModel):
            _drop_deserializers(model)


def _drop_deserializers(model: PreTrainedModel) -> None:
    """Takes torchao's reading step off the conversions that transformers inverts for saving.

    It has no inverse (transformers 5.23, `TorchAoDeserialize.reverse_op`), so that a reloaded quantized model could
    not be saved again. Flattening the tensors is the quantizer's work and needs none. An inverse upstream would remove
    this.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(isinstance(op, TorchAoDeserialize) for op in getattr(conversion, "operations", ()))
        ]
