"""LTX-2 from the command line.

    python pipelines/ltx2.py "a red circle" --model PATH --quantization-transformer int8 -o out.mp4

`--help` lists the options; they are those of `llm-dit generate`.
"""

from llm_dit.cli import run_family_script

if __name__ == "__main__":
    run_family_script("ltx2")
