"""An adapter's manifest on disk, and beside it the model card made of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from d2lora.adapters.base_files import hub_id
from d2lora.adapters.manifest import MANIFESTS, Manifest
from d2lora.runtime.grids import code, inline
from d2lora.runtime.run_folder import write_json, write_text
from d2lora.settings import FRESH

CARD_FILE, MERGED = "README.md", "merged.json"
"""The card, and beside a merged model the manifest of the adapter that was merged."""
Form = Literal["adapter", "merged"]


@dataclass(frozen=True)
class Published:
    """What a card says of a model that has a place on the hub."""

    repo: str
    base_id: str | None
    """The base's hub id; None where the hub does not have it."""
    license: str | None = None
    scores: tuple[EvalResult, ...] = ()
    """Means of scores; `metric_args` holds the number of rows and the 95 % CI."""
    about: str = ""
    """Markdown of the author's."""


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest and the card beside the adapter."""
    write_text(folder / CARD_FILE, card(manifest))
    write_json(folder / MANIFESTS[manifest.kind], manifest.model_dump(mode="json"))


def write_merged(manifest: Manifest, folder: Path) -> None:
    """Write the merged adapter's manifest and the card beside the model."""
    write_text(folder / CARD_FILE, card(manifest, "merged"))
    write_json(folder / MERGED, manifest.model_dump(mode="json"))


def card(manifest: Manifest, form: Form = "adapter", published: Published | None = None) -> str:
    """Return the model card, in Markdown with the hub's metadata.

    Args:
        manifest: Of the adapter.
        form: Whether it is apart, or merged into its base.
        published: What is known of its place on the hub; None for a card on this machine.
    """
    base_id = hub_id(manifest.base.id) if published is None else published.base_id
    published = published or Published("this folder", base_id)
    kind = f"LoRA {manifest.kind}"
    made = f"A {kind} made by d2lora" if manifest.cost else f"A {kind}"
    title = made if form == "adapter" else f"A model with a {kind} merged in"
    table = "\n".join(f"| {name} | {value} |" for name, value in _facts(manifest).items())
    parts = [
        f"---\n{_metadata(manifest, form, published)}\n---\n\n# {title}",
        published.about.strip(),
        f"| | |\n|---|---|\n{table}",
        _data(manifest),
        _scores(published.scores),
        _usage(form, published, new_tokens=bool(manifest.lora.add_tokens)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(manifest: Manifest, form: Form, published: Published) -> str:
    """Return the hub's metadata, in YAML."""
    relation = "adapter" if form == "adapter" else "finetune"
    return ModelCardData(
        library_name="peft" if form == "adapter" else "transformers",
        base_model=published.base_id,
        base_model_relation=relation if published.base_id else None,
        license=published.license,
        pipeline_tag="text-generation",
        tags=["lora", "d2lora"] if manifest.cost or form == "merged" else ["lora"],
        model_name=published.repo.rpartition("/")[2] if published.scores else None,
        eval_results=list(published.scores) or None,
    ).to_yaml()


def _facts(manifest: Manifest) -> dict[str, Any]:
    """Return what the manifest knows, for the card's table."""
    base, lora, cost = manifest.base, manifest.lora, manifest.cost
    facts: dict[str, Any] = {
        "base": code(base.id or "not known")
        + (f" at {inline(base.revision)}" if base.revision else ""),
        "base fingerprint": code(base.fingerprint) if base.fingerprint else "",
        "base quantization": inline(base.quantization or ""),
        "rank, alpha": f"{lora.rank}, {lora.alpha:g}",
        "targets": inline(", ".join(lora.targets)),
        "trained whole": inline(", ".join(lora.modules_to_save)),
        "new tokens": " ".join(map(code, lora.add_tokens)),
    }
    if cost:  # an adapter of d2lora's own, here and in the title
        facts |= {
            "initialized from": _initialized_from(manifest),
            "objective": _objective(manifest),
            "chat format": manifest.chat_format,
            "training rows": f"{manifest.n_examples:,} ({inline(manifest.selection)})",
            "steps, tokens": f"{cost['n_steps']:,}, {cost['n_tokens']:,}",
            "time": f"{cost['elapsed_s']:.0f} s",
            "held-out loss": _losses(manifest),
        }
    return {name: value for name, value in facts.items() if value}


def _data(manifest: Manifest) -> str:
    lines = [
        f"- {code(d['file'])}, {d['rows']:,} rows, sha256 {code(d['sha256'])}"
        for d in manifest.data
    ]
    return "\n".join(["Data:", "", *lines]) if lines else ""


def _scores(scores: tuple[EvalResult, ...]) -> str:
    """Return the scores as a table; the metadata has their means alone."""
    rows = [
        f"| {inline(str(score.dataset_name))} | {inline(str(score.metric_name))} | "
        f"{score.metric_value:.4g} | "
        f"{args['low']:.4g} to {args['high']:.4g} | {args['rows']:,} |"
        for score in scores
        if (args := score.metric_args)
    ]
    head = ["| test rows | score | mean | 95 % CI | rows |", "|---|---|---|---|---|"]
    return "\n".join(["Scores:", "", *head, *rows]) if rows else ""


def _usage(form: Form, published: Published, *, new_tokens: bool) -> str:
    if form == "merged":
        return MERGED_USAGE.format(repo=published.repo)
    usage = USAGE_WITH_TOKENS if new_tokens else USAGE
    return usage.format(base=published.base_id or "the base named above", repo=published.repo)


def _objective(manifest: Manifest) -> str:
    name = inline(manifest.objective.upper())
    if manifest.objective == "sft":
        return name
    held = f", reference {inline(manifest.reference)}" if manifest.reference else ""
    return f"{name}, beta {manifest.settings['beta']:g}{held}"


def _initialized_from(manifest: Manifest) -> str:
    if not manifest.lineage:
        about = manifest.initialization or {"name": FRESH}
        made = f"{inline(str(about['name']))} LoRA"
        kept = about.get("energy_kept")
        if kept is None:
            return made
        rank = about["converted_from_rank"]
        return f"{made} of rank {rank}, cut at the end: {kept:.1%} of what was learnt is kept"
    return f"warm start {code(manifest.lineage[-1].path)}"


def _losses(manifest: Manifest) -> str:
    before, after = manifest.validation_loss_before, manifest.validation_loss_after
    if before is None or after is None:
        return "not measured"
    return f"{before:.4f} before, {after:.4f} after"


USAGE = """It loads with PEFT alone, on the base named above:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{repo}")
```"""
USAGE_WITH_TOKENS = """It loads with PEFT alone, on the base above with rows for the new tokens:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{base}")
if len(tokenizer) > model.get_input_embeddings().num_embeddings:
    model.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(model, "{repo}")
```"""
MERGED_USAGE = """It loads with transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```"""
