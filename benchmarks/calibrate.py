"""Device memory of single components at real sizes, for the constants of the planner.

    python benchmarks/calibrate.py --jobs 8 -o benchmarks/results/calibrate-h200.json

The same as `llm-dit bench calibrate`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "calibrate")
