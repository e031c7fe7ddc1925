"""A published script beside itself: as it is, and with the one line changed that docs/integrations.md names.

    git clone https://github.com/huggingface/accelerate
    python -m bench.scripts accelerate/examples/nlp_example.py

A `.py` file, or a page whose blocks of Python make one script (`.md`, `.rst`). What scripts take from a hub is stood in
for by folders of the hub's names where they run (bench/hub.py): small models, texts and digits of the same form;
`--mnist 6000` gives so many images of MNIST itself. Both begin from one seed, so that a script that sets none draws the
same numbers twice. Both ends are printed one under the other; `--show` prints the changed line and ends.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from bench.hub import write_standins

ROOT = Path(__file__).resolve().parents[1]
#: What is changed: the first line that fits, and what it becomes.
LINES = (
    (r"from accelerate import (.*)", r"from ane_trainer.interop.accelerate import \1"),
    (r"from transformers import (.*\bTrainer\b.*)", r"from ane_trainer.interop.transformers import \1"),
    (r"from transformers import (\((?=[^)]*\bTrainer\b))", r"from ane_trainer.interop.transformers import \1"),
    (r"import (?:pytorch_)?lightning(?:\.pytorch)? as (\w+)", r"from ane_trainer.interop import lightning as \1"),
    (
        r"from (?:pytorch_lightning|lightning\.pytorch) import (.*\bTrainer\b.*)",
        r"from ane_trainer.interop.lightning import \1",
    ),
    (r"(history = )?model\.fit\((.*)", r"import ane_trainer as at; \1at.fit_keras(model, \2"),
)  # fmt: skip
#: What a script for GPUs needs, as it is, to train on a CPU in single precision.
ON_CPU = ((r"\bbf16=True", "use_cpu=True"), (r'\bdtype="auto"', 'dtype="float32"'))
#: What of a page needs an account of a hub.
ACCOUNT = re.compile(
    r"^\s*(?:from huggingface_hub import login|login\(\)|trainer\.push_to_hub\(\))\n", re.MULTILINE
)
#: Printed by a script that changed an import, as it ends: the programs that ran. (`fit_keras` prints its own lines.)
REPORT = "\nfrom ane_trainer.ane.dynamo import report as _report\nprint(_report())\n"
#: Printed by both where the result is logged and not printed: Lightning's last values.
LOGGED = "\nprint({name: round(float(value), 6) for name, value in trainer.callback_metrics.items()})\n"
#: Starts a script from a seed (Keras draws those of its layers from `random`), with the stand-in of Keras' MNIST, which
#: Keras would compare with the hash of its own file.
START = """import importlib.util, os, random, runpy, sys
import numpy, torch
if "KERAS_HOME" in os.environ and importlib.util.find_spec("keras"):
    from keras.src.utils import file_utils
    file_utils.validate_file = lambda *_, **__: True
seed = int(sys.argv.pop(1))
random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script_of(path: Path) -> str:
    """The Python of a script or a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```(?:py|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    elif path.suffix == ".rst":
        found = re.findall(
            r"^\.\. (?:code-block|testcode|code)::(?: python)?\n((?:\n|[ \t].*\n)*)", text, re.MULTILINE
        )
        blocks = [textwrap.dedent(re.sub(r"^ +:.*\n", "", block, flags=re.MULTILINE)) for block in found]
        text = "\n".join(
            block for block in blocks if "import" in block or "fit(" in block or "setup data" in block
        )
    return ACCOUNT.sub("", text)


def changed(script: str) -> tuple[str, str, str]:
    """The script with its line changed, that line, and what it was."""
    for pattern, new in LINES:
        found = re.search(rf"^{pattern}$", script, re.MULTILINE)
        if found:
            line = found.expand(new)
            return script[: found.start()] + line + script[found.end() :], line, found[0]
    raise SystemExit(
        "scripts: needs a line that docs/integrations.md names; got none. See LINES of bench/scripts.py."
    )


def for_cpu(script: str) -> tuple[str, list[str]]:
    """The script as it is on a CPU, and what that changed."""
    notes = []
    for pattern, new in ON_CPU:
        notes += [f"{found} -> {new}" for found in dict.fromkeys(re.findall(pattern, script))]
        script = re.sub(pattern, new, script)
    return script, notes


def run(script: str, folder: Path, arguments: list[str], environment: dict[str, str], seed: int = 0) -> str:
    """What the script prints, started in the folder."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    # datasets' cache tells local folders apart by their names alone: a home of its own
    settings = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": path,
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", START, str(seed), "script.py", *arguments],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"scripts: {folder / 'script.py'} ended with {done.returncode}\n{done.stderr[-3000:]}"
        )
    return done.stdout + "".join(
        line + "\n" for line in done.stderr.splitlines() if line.startswith("ane_trainer:")
    )


def both_ends(
    script: str,
    folder: Path,
    arguments: list[str] | None = None,
    environment: dict[str, str] | None = None,
    seed: int = 0,
    mnist: int = 0,
) -> tuple[str, str]:
    """What the script prints as it is, on the CPU, and with its line changed."""
    ends = []
    if "lightning" in changed(script)[1] and re.search(r"^trainer\.fit\(", script, re.MULTILINE):
        script += LOGGED
    after, line, _ = changed(script)
    for name, text in (
        ("as it is", for_cpu(script)[0]),
        ("changed", after + REPORT * ("fit_keras" not in line)),
    ):
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True)
        given = write_standins(text, place, mnist)
        ends.append(run(text, place, arguments or [], {**given, **(environment or {})}, seed))
    return ends[0], ends[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs="*", help="of the script, after --")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mnist", type=int, default=0, metavar="N", help="N images of MNIST to train on")
    options = parser.parse_args()
    script = script_of(options.script)
    _, new, old = changed(script)
    print(f"- {old}\n+ {new}")
    for note in for_cpu(script)[1]:
        print(f"as it is, on a CPU in single precision: {note}")
    if options.show:
        return
    with tempfile.TemporaryDirectory() as folder:
        ends = both_ends(script, Path(folder), options.arguments, seed=options.seed, mnist=options.mnist)
        for name, end in zip(("as it is", "changed"), ends, strict=True):
            print(f"\n{name}\n{textwrap.indent(end.strip(), '  ')}")


if __name__ == "__main__":
    main()
