"""What quantizing does to pictures: the same prompts and seeds under each method, compared with bf16.

    python benchmarks/quality.py PIPELINE --methods int8,fp8-dynamic,int4 --captions 200 --report quality.html

The same as `llm-dit bench quality`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "quality")
