"""Load time and peak memory of bf16, plain diffusers + TorchAoConfig, and llm-dit, each in a fresh process.

    python benchmarks/load.py                      # 1.2 GB of bf16, on what there is
    python benchmarks/load.py --geometry klein-9b  # 18 GB of disk

The same as `llm-dit bench load`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "load")
