"""Make the warm start that comes with d2lora, of SmolLM2-135M-Instruct, from public data sets.

    python scripts/demo_warm_start.py ../shared/data src/d2lora/shipped/smollm2-warm-start

1,200 rows of T0's tasks, without maths and titles, are learnt once, in half an hour on a core; rows
that overlap with a test row are kept out. The adapter is written in bfloat16.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from d2lora.adapters.base_files import SMOLLM2_HUB_ID
from d2lora.adapters.files import ADAPTER_CONFIG
from d2lora.runtime.run_folder import read_json, write_json

WARM_UP = """warmup --base smollm2 --dtype float32 --data data/general/train.jsonl --m 1200 --rank 8
--learning-rate 0.0005 --epochs 1 --batch-size 16 --schedule cosine --max-length 512
--overlong truncate --keep-out data/titles/test.jsonl data/forgetting/test.jsonl
data/gsm8k/test.jsonl --checkpoint-every 10 --out warm-up"""
ORIGIN = """Made by `scripts/demo_warm_start.py` on SmolLM2-135M-Instruct (Apache-2.0,
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) from 1,200 rows of T0's training
mixture (Apache-2.0, https://github.com/yizhongw/self-instruct), which holds no titles and no maths.
Its licence is that of d2lora, Apache-2.0.
"""


def main() -> None:
    """Warm up, convert, and name the base as others know it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", type=Path, help="folder of the public data sets")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    out = args.out.resolve()
    # Started in a folder of its own, so that the manifest names no folder of this machine.
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "data").symlink_to(args.sets.resolve())
        d2lora(WARM_UP.split(), work)
        d2lora(["convert", "--adapter", "warm-up", "--dtype", "bfloat16", "--out", str(out)], work)
    config = read_json(out / ADAPTER_CONFIG)
    write_json(out / ADAPTER_CONFIG, {**config, "base_model_name_or_path": SMOLLM2_HUB_ID})
    (out / "ORIGIN.md").write_text(ORIGIN, encoding="utf-8")


def d2lora(words: list[str], folder: str) -> None:
    """Run a command as a user would."""
    subprocess.run([sys.executable, "-m", "d2lora", *words], cwd=folder, check=True)


if __name__ == "__main__":
    main()
