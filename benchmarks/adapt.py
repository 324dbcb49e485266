"""`d2lora adapt` as a process against the same `trl sft` run, and start-up alone.

    python benchmarks/adapt.py --sizes 64 256

    python benchmarks/adapt.py --bases 40M --sizes 64

Same base, rows, adapter, batches, epochs, rate, seed and precision on each side (see
runs.py). `trl sft` is measured as it comes and without gradient checkpointing. The mean losses of
the last epoch show that both train the same thing. Start-up: `--help`, and the time from the
start of the command to the end of the first optimizer step. Prints two Markdown tables of medians.
"""

import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import runs
from common import base_of, console_script, head, medians, parser_of, ran, row, taking_turns


def main() -> None:
    """Measure both at every base and print the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--bases", nargs="+", default=["embedded"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256], help="rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = {size: base_of(size, folder, args.data) for size in args.bases}
        whole(args.data, bases, args.sizes, folder, args.rounds, args.threads)
        start_up(args.data, bases, folder, args.rounds, args.threads)


def whole(
    data: Path, bases: dict[str, str], sizes: list[int], folder: Path, rounds: int, threads: int
) -> None:
    """Print the table of whole runs."""
    head(
        "base", "rows", "side", "whole run, s", "d2lora is", "steps", "mean loss of the last epoch"
    )
    for (size, base), n in product(bases.items(), sizes):
        ours, theirs = runs.write_rows(data, n, folder)
        sft = partial(runs.run_sft, theirs, folder / "sft", threads, base=base)
        sides = {
            "d2lora adapt": partial(runs.run_adapt, ours, folder / "adapt", threads, base=base),
            "trl sft, best": partial(sft, gradient_checkpointing=False),
            "trl sft": sft,
        }
        done = taking_turns(sides, rounds)
        elapsed_s = medians({side: [run.elapsed_s for run in of] for side, of in done.items()})
        for side, of in done.items():
            losses = of[-1].losses
            last = losses[-(len(losses) // 3) :]
            ratio = elapsed_s[side] / elapsed_s["d2lora adapt"]
            mean = sum(last) / len(last)
            row(
                size, n, side, f"{elapsed_s[side]:.1f}", f"{ratio:.2f} x", len(losses),
                f"{mean:.3f}",
            )  # fmt: skip


def start_up(data: Path, bases: dict[str, str], folder: Path, rounds: int, threads: int) -> None:
    """Print the table of `--help` and of the first step."""
    ours, theirs = runs.write_rows(data, 64, folder)
    sides = {
        f"{name} --help": partial(seconds_of_help, name, threads) for name in ("d2lora", "trl")
    }
    for size, base in bases.items():
        sides[f"d2lora adapt, first step, {size}"] = partial(
            runs.first_step_of_adapt, ours, folder / "first-adapt", threads, base
        )
        sides[f"trl sft, first step, {size}"] = partial(
            runs.first_step_of_sft, theirs, folder / "first-sft", threads, base
        )
    print()
    head("start-up", "s")
    for side, elapsed_s in medians(taking_turns(sides, rounds)).items():
        row(side, f"{elapsed_s:.2f}")


def seconds_of_help(name: str, threads: int) -> float:
    """Return the seconds that a command's `--help` takes."""
    return ran([console_script(name), "--help"], threads)[0]


if __name__ == "__main__":
    main()
