"""Several GPUs against one: a large picture split between them, and a list of prompts shared out.

    python benchmarks/parallel.py -o benchmarks/results/parallel-2xh200.json

Without a GPU it compares two processes with one on tiny models. The same as `llm-dit bench parallel`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "parallel")
