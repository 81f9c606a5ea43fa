"""Official-layout fp8 files against run-time quantization and layerwise casting: loading, memory, speed, error.

    python benchmarks/checkpoint.py --geometry klein-9b --geometry ltx-2.3 --folder SPACE -o benchmarks/results/checkpoint.json

The files are written by our own converter and removed afterwards; ltx-2.3 takes 57 GB. The same as `llm-dit bench checkpoint`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "checkpoint")
