"""`llm-dit plan`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from .terminal import console, print_plain
from .writing import check_place, write_text

if TYPE_CHECKING:
    from .forwards import Size
    from .planning.card import Card
    from .planning.sizes import PipelineSizes

ALL: Final = "all"
OFFLINE: Final = ("flux2-dev", "klein-4b", "klein-9b", "z-image-turbo", "qwen-image", "ltx-2", "ltx-2.3")
"""The published models that `all` stands for."""


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a repository id, a name such as klein-9b, or all.")],
    vram: Annotated[
        list[str] | None, typer.Option(help="12GB, 22.5GiB ...; repeatable: a matrix. The card's if left out.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="A class of card, e.g. rtx-4090, rtx-3060, h200; the one at hand if any.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures or clips at once.")] = 1,
    references: Annotated[int, typer.Option(help="Reference images.")] = 0,
    table: Annotated[Path | None, typer.Option(help="Write the matrix as a page of Markdown.", callback=check_place)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, also when nothing fits.")] = False,
) -> None:
    """Whether a model fits, and what to use; exit code 1 if no plan of those asked for fits."""
    from .planning.card import parse_bytes
    from .planning.plan import checked_size, make_plan
    from .planning.show import matrix, page, shown
    from .planning.sizes import pipeline_sizes

    chosen = _card(card, bool(vram))
    budgets = [parse_bytes(text) for text in vram] if vram else [_memory(chosen)]
    plans = []
    for name in OFFLINE if model == ALL else (model,):
        sizes = pipeline_sizes(name, "read")
        size = checked_size(sizes, _size(sizes, height, width, frames, batch, references))
        plans += [make_plan(name, budget, chosen, size) for budget in budgets]
    if table is not None:
        write_text(table, page(plans, _command(model, vram, card, table)))
    if as_json:
        found = [one.to_dict() for one in plans]
        print_plain(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    else:
        console.print(shown(plans[0]) if len(plans) == 1 else matrix(plans))
    if not any(one.fits for one in plans):
        raise typer.Exit(1)


def _card(name: str | None, budgeted: bool) -> Card:
    """The card that is named, or at hand, or any."""
    from .planning.card import ANY_CARD, get_card
    from .planning.detect import card_at_hand

    if name is not None:
        return get_card(name)
    found = card_at_hand()
    if found is None and not budgeted:
        raise ValueError("there is no GPU here to plan for: give --vram 24GB, or --card rtx-4090")
    return found or ANY_CARD


def _memory(card: Card) -> int:
    """What there is to plan with: what is free of the card at hand, or all of a class of cards."""
    if not card.memory_bytes:
        raise ValueError(f"{card.name} has no size of its own: give --vram 24GB")
    return card.memory_bytes


def _size(sizes: PipelineSizes, height: int | None, width: int | None, frames: int | None, batch: int, references: int) -> Size:
    from dataclasses import replace

    from .planning.plan import default_size

    given = {"height": height, "width": width, "frames": frames}
    return replace(default_size(sizes), **{k: v for k, v in given.items() if v is not None}, batch=batch, references=references)


def _command(model: str, vram: list[str] | None, card: str | None, table: Path) -> str:
    """The command as it was given, for the page that it writes."""
    words = ["llm-dit plan", model, *(f"--vram {text}" for text in vram or ())]
    words += [f"--card {card}"] if card else []
    return " ".join([*words, f"--table {table}"])
