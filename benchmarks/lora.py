"""Fusing 1, 2 and 4 LoRAs into a quantized transformer: seconds, and device memory above what is held already.

    python benchmarks/lora.py --geometry klein-9b --folder SPACE -o benchmarks/results/lora-h200.json

The same as `llm-dit bench lora`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "lora")
