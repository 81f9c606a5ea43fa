"""Whole pipelines of the published sizes in the budgets that their plans promise, and plain diffusers in the same.

    python benchmarks/budgets.py --folder SPACE -o benchmarks/results/budgets-h200.json

The same as `llm-dit bench budgets`. It writes up to 45 GB at once into SPACE, and removes them.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "budgets")
