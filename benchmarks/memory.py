"""Peak memory of training: as `adapt --dry-run` estimates it, and as it is measured.

    python benchmarks/memory.py --bases embedded smollm2 --lengths 256 1024

Every row is cut to the same length; a step is one pass of 1,024 tokens. Estimate and run are
processes of their own, and the measured peak is that of the run alone, after the base was loaded
(`peak_memory_bytes` of the manifest). Prints a Markdown table.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import environment, head, parser_of, row

N_STEPS, N_ROWS, PASS = 2, 8, 1024


def main() -> None:
    """Estimate and measure each base at each length, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--bases", nargs="+", default=["embedded", "smollm2"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--quantizations", nargs="+", default=["none"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", choices=["estimate", "run"])
    args = parser.parse_args()
    if args.child:
        report(args.child, args.bases[0], args.lengths[0], args.device, args.quantizations)
        return
    head("base", "tokens a row", "checkpointing", "estimated, MB", "measured, MB", "ratio")
    for base in args.bases:
        for quantization in args.quantizations:
            for length in args.lengths:
                for checkpointing in ("off", "on"):
                    estimated, measured = (
                        child(what, args, base, length, checkpointing, quantization)
                        for what in ("estimate", "run")
                    )
                    row(
                        base if quantization == "none" else f"{base}, {quantization}",
                        str(length), checkpointing, f"{estimated / 1e6:.0f}",
                        f"{measured / 1e6:.0f}", f"{estimated / measured:.2f}",
                    )  # fmt: skip


def child(
    what: str, args: Any, base: str, length: int, checkpointing: str, quantization: str
) -> int:
    """Return the bytes that a process of its own reports."""
    words = [
        "--child", what, "--bases", base, "--lengths", str(length), "--device", args.device,
        "--quantizations", quantization, checkpointing,
    ]  # fmt: skip
    line = [sys.executable, __file__, *words]
    done = subprocess.run(
        line, env=environment(args.threads), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(line)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def report(what: str, base: str, length: int, device: str, options: list[str]) -> None:
    """Print the bytes that a run would take, or takes."""
    from d2lora import AdaptSettings, adapt
    from d2lora.adaptation import dry_run

    quantization, checkpointing = options
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "rows.jsonl"
        text = " ".join(f"The {number}th word of a long text." for number in range(length))
        rows = [{"prompt": f"{n}. {text}", "completion": f"{n} words"} for n in range(N_ROWS)]
        data.write_text("".join(json.dumps(values) + "\n" for values in rows), encoding="utf-8")
        settings = AdaptSettings(
            base=base, data=(str(data),), out=Path(name) / "out", max_steps=N_STEPS,
            batch_size=max(1, PASS // length),
            max_length=length, overlong="truncate", checkpointing=checkpointing, device=device,
            quantization=None if quantization == "none" else quantization, quiet=True,
        )  # fmt: skip
        if what == "estimate":
            print(dry_run(settings.changed(max_steps=1)).peak)
        else:
            print(adapt(settings).manifest.cost["peak_memory_bytes"])


if __name__ == "__main__":
    main()
