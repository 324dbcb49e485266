"""The reference policy of DPO: its log-probabilities, computed once and kept in the run folder.

The reference is the base (the adapter switched off) or the adapter before training, so no second
model is held. A resumed run reads what the first one wrote.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel

from d2lora.data.batches import PreferencePair
from d2lora.errors import counted
from d2lora.runtime.claims import is_main_process
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import read_json, write_json
from d2lora.scoring.pairs import pair_log_probabilities
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import Reference

FILE = "reference.json"


@dataclass(frozen=True)
class ReferencePolicy:
    """A frozen policy inside the model that is trained.

    Attributes:
        name: What it is called in the manifest.
        model: The model, with the adapter before training.
        switched_off: Whether the adapter is switched off for it.
        fingerprint: Of the base's weights.
    """

    name: Reference
    model: PeftModel
    switched_off: bool
    fingerprint: str

    def key(self, pairs: Sequence[PreferencePair]) -> str:
        """Return what the log-probabilities depend on: policy, where it computes, token ids."""
        digest = hashlib.sha256()
        where = f"{self.model.dtype} {self.model.device.type} {torch.__version__}"
        digest.update(f"{self.name} {self.fingerprint} {where}".encode())
        if not self.switched_off:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    digest.update(name.encode())
                    digest.update(parameter.detach().float().cpu().numpy().tobytes())
        for pair in pairs:
            ids = [[*item.ids, item.n_prompt] for item in (pair.chosen, pair.rejected)]
            digest.update(json.dumps(ids).encode())
        return digest.hexdigest()


def log_probabilities_of(
    policy: ReferencePolicy, pairs: Sequence[PreferencePair], pad_id: int, max_tokens: int = 0
) -> list[tuple[float, float]]:
    """Return the summed log-probabilities of both completions of each pair, in nats."""
    off = policy.model.disable_adapter() if policy.switched_off else nullcontext()
    with off:
        scorer = TokenScorer(policy.model).eval()
        return pair_log_probabilities(scorer, pairs, pad_id, max_tokens)


def with_reference(
    policy: ReferencePolicy,
    pairs: Sequence[PreferencePair],
    folder: Path,
    reporter: Reporter,
    *,
    pad_id: int,
    max_tokens: int = 0,
    process: tuple[int, int] = (0, 1),
) -> tuple[list[PreferencePair], int]:
    """Add to pairs their log-probabilities under the reference policy.

    Args:
        policy: The reference policy.
        pairs: Training and validation pairs.
        folder: The run folder, where they are kept.
        reporter: Where messages go.
        pad_id: Token id for padding.
        max_tokens: Padded tokens of a forward pass; 0: what suits the device.
        process: Number of this process, and of all; each scores its share.

    Returns:
        The pairs, and how many tokens were run forward for it, now or by the run resumed.
    """
    path, key = folder / FILE, policy.key(pairs)
    kept = read_json(path) if path.is_file() else {}
    if kept.get("key") == key:
        values = kept["log_probabilities"]
    else:
        rank, world = process
        reporter.say(
            f"reference policy: {policy.name}; scoring {counted(len(pairs), 'pair')} with it"
        )
        mine = log_probabilities_of(policy, pairs[rank::world], pad_id, max_tokens)
        numbered = list(zip(range(rank, len(pairs), world), mine, strict=True))
        every = gather_object(numbered) if world > 1 else numbered
        values = [value for _, value in sorted(every)]
        if is_main_process():
            write_json(path, {"key": key, "policy": policy.name, "log_probabilities": values})
    n_tokens = sum(pair.n_tokens for pair in pairs)
    scored = zip(pairs, values, strict=True)
    return [replace(pair, reference=(chosen, rejected)) for pair, (chosen, rejected) in scored], (
        n_tokens
    )
