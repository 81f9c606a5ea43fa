"""What quantizing does to pictures: the same prompts and seeds under each method, compared with bf16.

Beside the pictures: how far the latents are at every step, which layers' outputs are noisiest, and, where the prompts are
captions of scenes (`llm_dit.tiny.scenes`), how many parts of a caption a program reads off the picture. How far bf16 is from
float32, or from its own compiled form, is measured too: no method can be asked to be closer than that.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..load import pipeline_class_of
from ..names import check_name
from ..quantization import METHODS, get_method
from ..quantization.hardware import require_support
from ..tiny import scenes
from ..writing import new_file, read_json_file, write_text
from .layer_noise import layer_noise
from .picture_metrics import metrics, require_metrics
from .pictures import batches, fingerprint, load, make
from .results import Row

REFERENCE: Final = "none"
FLOORS: Final = ("float32", "compile", "skip")
WORST: Final = 5
"""Layers that are named."""
_HELD_OUT: Final = 939
"""Scenes of two things that are held out."""
_SOUND: Final = "sound"
"""Beside the latents of a clip, in their file."""


@dataclass(frozen=True)
class Options:
    """What to compare, and how.

    Attributes:
        source: a pipeline's folder or repository.
        methods: of the transformer.
        prompts: one picture each; the n-th is made with seed n everywhere.
        folder: keeps pictures and results, from which an interrupted run goes on.
        captions: the prompts are captions of scenes, or of clips, and are scored.
        call: further arguments of the pipeline's call, e.g. its size.
        floor: what bf16 is compared with for the noise floor: "float32", "compile" or "skip".
        batch: prompts of one call; which of them share one changes a picture no more than rounding does.
    """

    source: str
    methods: tuple[str, ...]
    prompts: tuple[str, ...]
    folder: Path
    captions: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    floor: str = "float32"
    batch: int = 1

    @cached_property
    def model(self) -> str:
        """What tells the source from others, and from what it was before it was changed."""
        return fingerprint(self.source)


def captions_for(source: str, count: int) -> tuple[str, ...]:
    """So many captions for the pipeline of a folder or repository: of clips if it makes clips, else of scenes."""
    return clip_captions(count) if pipeline_class_of(source).family.generation.video else scene_captions(count)


def clip_captions(count: int) -> tuple[str, ...]:
    """Captions of clips that no model of ours was trained on, always the same; they are few, and come again."""
    held_out = [caption for caption, clip in _CLIPS.items() if scenes.clip_held_out(clip)]
    return tuple(islice(cycle(held_out), count))


_CLIPS: Final = {
    clip.caption: clip
    for *thing, way in product(scenes.SIZES, scenes.COLOURS, scenes.SHAPES, scenes.DIRECTIONS)
    for clip in (scenes.Clip(scenes.Thing(*thing), way),)
}
"""All clips by their captions."""


def scene_captions(count: int) -> tuple[str, ...]:
    """Captions of scenes that no model of ours was trained on, always the same.

    Raises:
        ValueError: for more than there are.
    """
    if count > _HELD_OUT:
        raise ValueError(f"there are {_HELD_OUT} captions that no model was trained on, and not {count}: ask for fewer")
    generator = np.random.default_rng(0)
    found: dict[str, None] = {}
    while len(found) < count:
        scene = scenes.sample(generator, single=0)
        if scenes.held_out(scene):
            found[scene.caption] = None
    return tuple(found)


def run(options: Options) -> Iterator[Row]:
    """A row for bf16, one for the noise floor, and one for every method.

    Raises:
        ValueError: for unknown names, where a library is missing, or if what is to be compared with is quantized itself.
    """
    require_metrics()
    check_name(options.floor, FLOORS, "floor")
    asked = [get_method(method) for method in options.methods]
    for row in asked:
        require_support(row)  # now, and not after the pictures of those before it
    methods = list(dict.fromkeys(row.name for row in asked if row.name != REFERENCE))
    if options.folder.exists() and not options.folder.is_dir():
        raise ValueError(f"{str(options.folder)!r} is a file, and pictures are to be kept there: give another --folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    _check_same_question(options)
    yield _measured(options, REFERENCE)
    if options.floor != "skip":
        yield _measured(options, options.floor)
    for method in methods:
        yield _measured(options, method)


def _check_same_question(options: Options) -> None:
    """Raises ValueError if the folder holds the pictures of another question."""
    asked = {
        "model": options.model,
        "prompts": list(options.prompts),
        "captions": options.captions,
        "call": {name: repr(value) for name, value in options.call.items()},
    }
    place = options.folder / "question.json"
    before = read_json_file(place) if place.is_file() and any(options.folder.glob("*/*.safetensors")) else asked
    said = {
        "model": "another model, or of this one before it was changed",
        "prompts": "other prompts",
        "captions": "the same prompts asked for otherwise (--captions, --prompts)",
        "call": "other sizes or steps",
    }
    other = [words for name, words in said.items() if before.get(name) != asked[name]]
    if other:
        raise ValueError(f"{str(options.folder)!r} holds pictures of {' and '.join(other)}: give another --folder, or remove it")
    write_text(place, json.dumps(asked, indent=2) + "\n")


def _measured(options: Options, method: str) -> Row:
    folder = options.folder / method
    done = folder / "row.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    facts = _generate_all(options, method, folder)
    asked = {"source": options.source, "model": options.model, "method": method, "prompts": len(options.prompts)}
    row = {**asked, **facts, **_compared(options, method)}
    write_text(done, json.dumps(row, indent=2) + "\n")
    return row


def _load(options: Options, method: str) -> Any:
    keywords: dict[str, Any] = {"torch_dtype": torch.float32 if method == "float32" else torch.bfloat16}
    keywords |= {"compile": True} if method == "compile" else {}
    if method in METHODS and method != REFERENCE:
        keywords["quantization_transformer"] = method
    pipe = load(options.source, **keywords)
    if pipe.quantization_report["transformer"].method == "already_quantized":
        raise ValueError(
            f"{options.source!r} holds a quantized transformer: give the bf16 pipeline, to which the methods are applied"
        )
    return pipe


def _generate_all(options: Options, method: str, folder: Path) -> Row:
    """Makes the pictures that are not there yet; returns what else the model says."""
    pipe = _load(options, method)
    worst: list[Any] = []
    bar = tqdm(desc=method, total=len(options.prompts), unit="picture", delay=2, leave=False)
    for prompts in batches(options.prompts, options.batch):
        if 0 in prompts and method in METHODS and method != REFERENCE:
            with layer_noise(pipe.transformer) as read:
                _generate(pipe, options, prompts, folder)
            worst = [asdict(layer) for layer in read()[:WORST]]
        elif not all(_latents(folder, number).is_file() for number in prompts):
            _generate(pipe, options, prompts, folder)
        bar.update(len(prompts))
    bar.close()
    held = pipe.quantization_report
    facts = {"bytes": held["transformer"].bytes_after, "worst_layers": worst}
    del pipe
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return facts


def _generate(pipe: Any, options: Options, prompts: Mapping[int, str], folder: Path) -> None:
    for seed, made in zip(prompts, make(pipe, options.source, prompts, options.call), strict=True):
        for number, picture in enumerate(made.pictures):
            Image.fromarray(picture).save(folder / f"{seed:04}-{number}.png")
        kept = {f"step{number:03}": tensor.contiguous() for number, tensor in enumerate(made.latents)}
        facts = {}
        if made.sound is not None:
            kept[_SOUND] = made.sound.contiguous()
            facts["sampling_rate"] = str(pipe.vocoder.config.output_sampling_rate)
        with new_file(_latents(folder, seed)) as beside:
            save_file(kept, beside, facts)


def _latents(folder: Path, seed: int) -> Path:
    return folder / f"{seed:04}.safetensors"


def _read_pictures(folder: Path, seed: int) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob(f"{seed:04}-*.png"))]


def _compared(options: Options, method: str) -> Row:
    row: Row = {}
    folder, reference = options.folder / method, options.folder / REFERENCE
    if options.captions:
        scores = [_score(folder, number, prompt) for number, prompt in enumerate(options.prompts)]
        row["caption_score"] = statistics.mean(one.whole for one in scores)
        row["caption_parts"] = statistics.mean(one.share for one in scores)
    if method == REFERENCE:
        return row
    numbers = range(len(options.prompts))
    pairs = [pair for i in numbers for pair in zip(_read_pictures(reference, i), _read_pictures(folder, i), strict=True)]
    for name, metric in metrics().items():
        row[name] = statistics.median(metric(*pair) for pair in pairs)
    errors = [_step_errors(_latents(reference, i), _latents(folder, i)) for i in numbers]
    row["latent_error"] = [statistics.median(step) for step in zip(*errors, strict=True)]
    return row


def _score(folder: Path, number: int, caption: str) -> scenes.Score:
    """What a program reads off the picture, or off the clip and its sound, of a caption."""
    pictures = [_to_scene(picture) for picture in _read_pictures(folder, number)]
    if caption not in _CLIPS:
        return scenes.score(pictures[0], caption)  # of several, as layered pipelines make, the first is the whole
    with safe_open(_latents(folder, number), "np") as file:
        if _SOUND not in file.keys():  # noqa: SIM118 (no mapping)
            return scenes.score_clip(np.stack(pictures), caption)
        return scenes.score_clip(np.stack(pictures), caption, file.get_tensor(_SOUND), float(file.metadata()["sampling_rate"]))


def _to_scene(picture: np.ndarray) -> np.ndarray:
    side = 128
    return picture if picture.shape[:2] == (side, side) else np.asarray(Image.fromarray(picture).resize((side, side)))


def _step_errors(reference: Path, other: Path) -> list[float]:
    """Relative L2 error of the latents after every step."""
    expected, found = load_file(reference), load_file(other)
    return [float((found[name] - expected[name]).norm() / expected[name].norm()) for name in sorted(expected) if name != _SOUND]


def default_folder(source: str) -> Path:
    """Where a run keeps its pictures if nobody says."""
    return Path("quality") / Path(source).name


def methods_of(text: str) -> Sequence[str]:
    """The methods of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]
