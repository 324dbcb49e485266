"""An adapter's manifest on disk, and beside it the model card made of it."""

from pathlib import Path
from typing import Any

from d2lora.adapters.manifest import MANIFESTS, Manifest, hub_id_of
from d2lora.runtime.run_folder import write_json, write_text


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest and the card beside the adapter."""
    write_text(folder / "README.md", card(manifest))
    write_json(folder / MANIFESTS[manifest.kind], manifest.model_dump(mode="json"))


def card(manifest: Manifest) -> str:
    """Return the model card, in Markdown with the hub's metadata."""
    base, lora, cost = manifest.base, manifest.lora, manifest.cost
    rows: dict[str, Any] = {
        "base": f"`{base.id}`" + (f" at {base.revision}" if base.revision else ""),
        "base fingerprint": f"`{base.fingerprint}`",
        **({"base quantization": base.quantization} if base.quantization else {}),
        "initialized from": _initialized_from(manifest),
        "objective": _objective(manifest),
        "chat format": manifest.chat_format,
        "rank, alpha": f"{lora.rank}, {lora.alpha:g}",
        "targets": ", ".join(lora.targets),
        "training rows": f"{manifest.n_examples:,} ({manifest.selection})",
        "steps, tokens": f"{cost['n_steps']:,}, {cost['n_tokens']:,}",
        "time": f"{cost['elapsed_s']:.0f} s",
        "held-out loss": _losses(manifest),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    data = "\n".join(
        f"- `{d['file']}`, {d['rows']:,} rows, sha256 `{d['sha256']}`" for d in manifest.data
    )
    return CARD.format(kind=manifest.kind, base=hub_id_of(base.id), table=table, data=data)


def _objective(manifest: Manifest) -> str:
    name = manifest.objective.upper()
    if manifest.objective == "sft":
        return name
    held = f", reference {manifest.reference}" if manifest.reference else ""
    return f"{name}, beta {manifest.settings['beta']:g}{held}"


def _initialized_from(manifest: Manifest) -> str:
    if not manifest.lineage:
        about = manifest.initialization
        return f"{about['name'] if about else 'fresh'} LoRA"
    return f"warm start `{manifest.lineage[-1].path}`"


def _losses(manifest: Manifest) -> str:
    before, after = manifest.validation_loss_before, manifest.validation_loss_after
    if before is None or after is None:
        return "not measured"
    return f"{before:.4f} before, {after:.4f} after"


CARD = """---
library_name: peft
base_model: {base}
pipeline_tag: text-generation
tags:
- lora
- d2lora
---

# A LoRA {kind} made by d2lora

| | |
|---|---|
{table}

Data:

{data}

It loads with PEFT alone, on the base named above:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""
