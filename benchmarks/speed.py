"""Speed of one transformer step: our methods and modes beside stock torchao, diffusers' layerwise casting and SDNQ.

    python benchmarks/speed.py --geometry klein-9b --no-fresh -o benchmarks/results/speed-h200.json --plot docs/speed.png
    python benchmarks/speed.py --geometry klein-9b --end-to-end -o benchmarks/results/end-to-end-h200.json

Without a GPU it measures a tiny transformer. An interrupted run goes on where it stopped. The same as
`llm-dit bench speed`.
"""

from llm_dit.cli import run_command

if __name__ == "__main__":
    run_command("bench", "speed")
