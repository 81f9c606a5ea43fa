"""Is memory flat over many generations of a tiny pipeline, through compiling, LoRA swaps and offloading?

    python benchmarks/soak.py -o benchmarks/results/soak.json

The same as `llm-dit bench soak`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "soak")
