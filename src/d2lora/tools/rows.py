"""How rows are read: the first of them as the model will see them.

d2lora inspect --data task.csv --task card.yaml --base smollm2
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from d2lora.data.batches import Encoded
from d2lora.data.encode import Encoder
from d2lora.data.encoded_sets import every
from d2lora.data.reading import labels_of, read_task
from d2lora.data.rows import Example
from d2lora.data.tasks import answers_of
from d2lora.errors import counted
from d2lora.evaluation.metrics import metrics_named
from d2lora.runtime.console import Reporter, table_console
from d2lora.runtime.run_folder import write_json
from d2lora.settings import BaseSettings, InspectSettings

N_SHOWN = 3
OPEN, CLOSE = "«", "»"
"""What supervised tokens stand between."""


@dataclass(frozen=True)
class Shown:
    """A row as the model will see it."""

    place: str
    n_tokens: int
    n_supervised: int
    given: str
    supervised: str
    choices: tuple[str, ...]
    """What the answer is chosen from, where rows bring their own."""


@dataclass(frozen=True)
class RowsSeen:
    """What was read."""

    task: str
    chat_format: str
    answers: str
    """open, closed, pairs, or none of documents."""
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    """Of closed answers."""
    n_rows: int
    n_answers: int
    """How many are learnt; of a conversation it may be several."""
    longest: int
    """Tokens of the longest prompt and answer."""
    median: float
    n_supervised: int
    """Supervised tokens of all rows."""
    first: list[Shown]


def see_rows(settings: InspectSettings) -> RowsSeen:
    """Read rows, and return how they are read.

    Raises:
        D2LoraError: If rows are bad, or the base's tokenizer or the card cannot be used.
    """
    base = BaseSettings(
        base=settings.base or "embedded",
        revision=settings.revision,
        gguf_file=settings.gguf_file,
        chat_template=settings.chat_template,
        template_args=settings.template_args,
    )
    encoder = Encoder.of_tokenizer(base, settings.chat_format)
    data = read_task(settings.data, settings.task, say=Reporter().say, check=encoder.check)
    metrics_named(data.task.metrics, data.task.named.folder)  # refused here, not after training
    examples = [answer for row in data.examples for answer in answers_of(data.task, row)]
    items = every(encoder.encode, examples)
    lengths = [item.length for item in items]
    shown = zip(examples[:N_SHOWN], items, strict=False)
    return RowsSeen(
        data.task.name,
        encoder.format,
        data.task.answers,
        data.task.metrics,
        labels_of(data),
        len(data.examples),
        len(items),
        max(lengths),
        statistics.median(lengths),
        sum(item.n_supervised for item in items),
        [_shown(example, item, encoder) for example, item in shown],
    )


def _shown(example: Example, item: Encoded, encoder: Encoder) -> Shown:
    given, supervised = (
        str(encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        for ids in (item.ids[: item.n_prompt], item.ids[item.n_prompt :])
    )
    return Shown(example.place, item.length, item.n_supervised, given, supervised, example.choices)


def print_rows(seen: RowsSeen, out: Path | None) -> None:
    """Print what was read, or write it as JSON."""
    if out is not None:
        from dataclasses import asdict

        write_json(out, asdict(seen))
    console = table_console()
    unscored = {"none": "nothing: documents", "pairs": "which of two completions is likelier"}
    scored = unscored.get(seen.answers) or ", ".join(seen.metrics)
    console.print(
        f"task {seen.task}, chat format {seen.chat_format}, scored by {scored}", markup=False
    )
    rows = counted(seen.n_rows, "row")
    if seen.n_answers > seen.n_rows:
        rows += f" with {seen.n_answers:,} answers"
    console.print(
        f"{rows}, {seen.median:,.0f} tokens in the median and {seen.longest:,} at "
        f"most; {seen.n_supervised:,} tokens are learnt, marked {OPEN}so{CLOSE}",
        markup=False,
    )
    if seen.labels:
        some = ", ".join(seen.labels[:10]) + (", ..." if len(seen.labels) > 10 else "")
        console.print(f"{len(seen.labels)} labels: {some}", markup=False)
    for row in seen.first:
        _print_row(console, row)


def _print_row(console: Console, row: Shown) -> None:
    console.print(f"\n{row.place}: {row.n_tokens:,} tokens, {row.n_supervised:,} learnt")
    text = Text(row.given, style="dim")
    text.append(f"{OPEN}{row.supervised}{CLOSE}", style="bold green")
    console.print(text)
    if row.choices:
        console.print(f"chosen from: {' | '.join(row.choices)}", markup=False)
