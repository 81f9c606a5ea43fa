"""Which layers a method harms most per byte it saves, and the skip list that holds a quality at the fewest bytes.

    python benchmarks/sensitivity.py PIPELINE --method int4 --psnr 30 --captions 8 --toml config.toml

The same as `llm-dit bench sensitivity`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "sensitivity")
