"""What the commands print with. Imports nothing heavy."""

from __future__ import annotations

import re
import sys
from typing import Final

from rich.console import Console

from .names import VALID_METHODS

# Piped output has no width of its own, and 80 columns would break every table.
console: Final = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
METHODS_HELP: Final = f"{', '.join(VALID_METHODS[:-1])} or {VALID_METHODS[-1]}"


def print_plain(text: str) -> None:
    """Prints text as it is: no markup in it, no line broken."""
    console.print(text, markup=False, soft_wrap=True)


_OPTIONS: Final = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "vram_budget": "--vram",
    "device_map": "--device",
}
"""Arguments that are options of another name; where only hyphens differ, the argument is a key of config.toml too."""


def as_typed(message: str) -> str:
    """An error of the library, its arguments named as they are typed on the command line."""
    message = re.sub(rf"\b({'|'.join(_OPTIONS)})\b", lambda found: _OPTIONS[found[0]], message)
    return re.sub(
        r"\b(quantization|activation_scale)='([\w-]+)'", lambda found: f"--{found[1].replace('_', '-')} {found[2]}", message
    )
