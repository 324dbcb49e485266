"""Hold causal language models of transformers against their own forward pass, and tabulate.

    python scripts/architectures.py > docs/reference/architectures.md    the table of all
    python scripts/architectures.py llama mixtral                        how far these are off

Each is built tiny, with random weights, from its configuration: odd shapes, attention windows
shorter than the rows, several experts. Training, decoding, multiple choice and pairs, on the fast
path and on the plain one, are compared with what the model's own forward pass says of each row
alone. Adapters are folded in and taken out, saved, loaded and merged, and training is resumed.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from d2lora import fast
from d2lora.adapters.attach import attached, merged, peft_warnings_ignored
from d2lora.adapters.base import Base, check_causal
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.adapters.manifest import save_adapter
from d2lora.adapters.targets import coverage
from d2lora.data.batches import Encoded, PreferencePair, Question, collate
from d2lora.embedded import BASE_DIR
from d2lora.errors import ModelError
from d2lora.evaluation.decoding import Decoder
from d2lora.evaluation.steps import steps_of
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import RunFolder
from d2lora.scoring.multiple_choice import continuation_scores
from d2lora.scoring.pairs import pair_log_probabilities
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import TrainSettings
from d2lora.tools.merge import merge
from d2lora.training.cost import TrainingFlops
from d2lora.training.lesson import Lesson
from d2lora.training.loop import train
from d2lora.training.objectives import SFT

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MISLOADED_BY_PEFT = {"laguna"}
"""PEFT 0.21 renames their shared experts' weights to names that nothing has, and drops them."""
N_TOKENS = 400
SMALL = {
    "vocab_size": N_TOKENS, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "sliding_window": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_layer": 2, "n_head": 4,
    "n_embd": 32, "n_inner": 40, "n_positions": 128, "d_model": 32, "d_ff": 40, "d_kv": 8,
    "num_layers": 2, "num_heads": 4, "num_encoder_layers": 2,
    "num_decoder_layers": 2, "ffn_dim": 40, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 40, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 40, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_expand": 2, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "state_size": 8, "expand": 2,
    "ffn_hidden_size": 40, "rotary_dim": 4, "n_ctx": 128, "embedding_size": 32,
    "word_embed_proj_dim": 32, "attention_hidden_size": 32, "emb_dim": 32, "n_layers": 2,
    "n_heads": 4, "lru_width": 32, "conv_dim": 32, "moe_ffn_hidden_size": 24,
}  # fmt: skip
"""Every name that configurations have for a size."""
ROPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
_SWITCHES = (
    "tie_word_embeddings attention_bias mlp_bias use_bias bias qkv_bias use_qkv_bias "
    "attention_out_bias add_bias_linear lm_head_bias mamba_proj_bias mamba_conv_bias "
    "use_conv_bias conv_bias use_qk_norm qk_layernorm"
).split()
ONLY_ROPE = {"phi3": "longrope", "phimoe": "longrope"}
FIXED: dict[str, set[str]] = {
    "dbrx": {"tie_word_embeddings"},
    "recurrent_gemma": {"rope_parameters"},
}
"""Settings of kinds that transformers' own code takes in one way only."""
NOT_TINY = {
    **dict.fromkeys(
        ("gemma3n", "gemma4_assistant", "gemma4_unified_assistant"),
        "needs another model or library",
    ),
    **dict.fromkeys(
        ("moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "got_ocr2"),
        "hears, sees or sings, and its other half is not made small",
    ),
    **dict.fromkeys(
        ("blt", "cohere_compass_text", "deepseek_v4", "dots3_note"),
        "its configuration needs more than sizes",
    ),
    **dict.fromkeys(
        ("reformer", "rwkv", "xlstm"),
        "its own forward or backward pass fails",
    ),
    "kimi_linear": "takes minutes even where it is tiny",
}
"""Kinds that are not tried, and why."""
FUSED = frozenset((
    "afmoe aria_text axk1 axk2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 "
    "dots3_note_text ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm_moe_dsa "
    "gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 "
    "hy_v4 inkling2_text inkling_text jamba jetmoe kolibri1 laguna llama4 llama4_text "
    "longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral olmoe "
    "phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next solar_open zaya"
).split())  # fmt: skip
"""Kinds that keep their experts in one tensor."""
_ALL_HEADS = (
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash "
    "minicpm3 youtu dots3_note_text"
).split()
"""Kinds whose heads all have keys of their own."""
_INDEXED = {
    "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_PICTURES = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
"""A tower that no text comes through."""
OWN: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4} for kind in _ALL_HEADS},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _HYBRID),
    "bailing_hybrid": {**_HYBRID, "num_key_value_heads": 4},
    "kimi_linear": {**_HYBRID, "num_key_value_heads": 4},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _INDEXED),
    **{kind: {"is_decoder": True} for kind in ("bert", "rembert", "electra", "roberta")},
    "fuyu_text": {"sliding_window": None},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3": {"vision_config": _PICTURES, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": N_TOKENS, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0],
    },
    "git": {"vision_config": _PICTURES},
    "roc_bert": {
        "is_decoder": True, "pronunciation_vocab_size": 50, "shape_vocab_size": 50,
        "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": 2 * ["linear_attention", "hybrid"],
        "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "adapter_rank": 8},
    "gemma4_text": {
        "vocab_size_per_layer_input": N_TOKENS, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm3": {
        "num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What some need beside."""


def tiny(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Return a random model of a kind, of some 30,000 parameters.

    Its matrices are four times as large as usual, and norms and biases are random, so that
    whatever is left out shows.

    Args:
        kind: Of `KINDS`.
        dtype: Of the weights.
        settings: In place of those in `SMALL`.
    """
    config = _config(kind, {**SMALL, **settings})
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n_parameters > 4_000_000:
        raise ValueError(f"{n_parameters:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
                else:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


def otherwise(kind: str, rope: str | None = None) -> dict[str, Any]:
    """Return settings by which a kind is unlike what `tiny` makes of it.

    Embeddings are tied where they were not, linear layers have biases or lack them, queries and
    keys are normed or not, and positions are turned by another kind of RoPE.

    Args:
        kind: Of `KINDS`.
        rope: Of `ROPES`; one by the kind's place among them if None.
    """
    usual = _config(kind, SMALL).get_text_config(decoder=True)
    made: dict[str, Any] = {
        name: not getattr(usual, name)
        for name in _SWITCHES
        if isinstance(getattr(usual, name, None), bool) and name not in FIXED.get(kind, ())
    }
    turned = getattr(usual, "rope_parameters", None)
    if turned and "rope_parameters" not in FIXED.get(kind, ()):
        rope = ONLY_ROPE.get(kind) or rope or ROPES[KINDS.index(kind) % len(ROPES)]
        n_angles = _n_angles(kind)
        if n_angles < 2 and rope == "dynamic":
            rope = "linear"  # transformers divides by the angles beyond one
        made["rope_parameters"] = _turned(turned, rope, n_angles)
        made["original_max_position_embeddings"] = 16
    return made


def _turned(usual: dict[str, Any], rope: str, n_angles: int) -> dict[str, Any]:
    """Return parameters of another kind of RoPE; of layers with full attention, if they differ."""
    if "rope_type" not in usual:
        turned = {**usual}
        for layers in ("full_attention", "hybrid"):
            if usual.get(layers):
                turned[layers] = _turned(usual[layers], rope, n_angles)
        return turned
    kept = {name: usual[name] for name in ("rope_theta", "partial_rotary_factor") if name in usual}
    longer = {"factor": 4.0, "original_max_position_embeddings": 16}
    factors = [1.0 + angle / n_angles for angle in range(n_angles)]
    own: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": longer,
        "llama3": {**longer, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {
            **longer, "short_factor": factors, "long_factor": [2 * f for f in factors],
            "short_mscale": 1.1, "long_mscale": 1.2,
        },
    }  # fmt: skip
    return {**kept, "rope_type": rope, **own[rope]}


def _n_angles(kind: str) -> int:
    """Return how many angles a kind turns a position by."""
    with torch.device("meta"):
        buffers = AutoModelForCausalLM.from_config(_config(kind, SMALL)).named_buffers()
        return next((b.numel() for name, b in buffers if name.endswith("inv_freq")), 4)


def _config(kind: str, settings: dict[str, Any]) -> Any:
    made = CONFIG_MAPPING[kind]
    parts = getattr(made, "sub_configs", None) or {}
    if "text_config" in parts:
        text = {**_known(parts["text_config"], settings), **OWN.get(f"{kind}_text", {})}
        tied = {k: v for k, v in settings.items() if k == "tie_word_embeddings"}
        return made(text_config=text, **OWN.get(kind, {}), **tied)
    return made(**{**_known(made, settings), **OWN.get(kind, {})})


def _known(made: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a configuration has; all where its class is not known."""
    if made is AutoConfig:
        return settings
    known = {*inspect.signature(made.__init__).parameters, *getattr(made, "attribute_map", {})}
    for parent in made.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
    return {name: value for name, value in settings.items() if name in known}


@dataclass
class Outcome:
    """How far a model's numbers are from its own, at most, and the paths that were taken."""

    refused: str = ""
    adapted: str = ""
    training: str = ""
    decoding: str = ""
    operations: str = ""
    not_merged: str = ""
    """Why the adapter cannot be merged."""
    fast_paths: list[str] = field(default_factory=list[str])
    off: dict[str, float] = field(default_factory=dict[str, float])
    """Differences: of the loss, relative; of the gradient, relative, the worst tensor's; of scores
    in nats; of logits, relative to the largest; completions, and weights, that differ."""


def held_against_itself(
    kind: str,
    dtype: torch.dtype = torch.float32,
    targets: tuple[str, ...] = ("all-linear",),
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Compare what a kind of model is used for with its own forward pass.

    In 16 bits, where each way rounds otherwise, numbers are compared with the same weights' in
    float32: how many times farther than the model's own pass they are.

    Args:
        kind: Of `KINDS`.
        dtype: Of the weights.
        targets: What gets an adapter.
        settings: Of the model, beside its sizes, as `otherwise` gives them.
    """
    build = partial(tiny, kind, dtype, **(settings or {}))
    model = build()
    try:
        check_causal(model, kind)
    except ModelError as error:
        return Outcome(refused=str(error))
    peft = _adapted(model, targets)
    found = Outcome(adapted=coverage(peft))
    if dtype == torch.float32:
        _train(peft, found)
        _decode(peft, found)
        _score(peft, found)
    else:
        exact = _adapted(build().float(), targets)
        exact.load_state_dict(peft.state_dict())
        _round(peft, exact, found)
        prompts = [list(ids) for ids in _rows(5, 3, 24, 2)]
        found.decoding = _way_to_decode(peft.get_base_model(), prompts)
    with TemporaryDirectory() as folder:
        _fold(peft, found)
        _keep(kind, build(), peft, Path(folder), found)
        _resume(_adapted(build(), targets), peft, Path(folder), found)
    if dtype == torch.float32:
        _count(peft, found)  # last, as it changes how experts are computed
    return found


def _adapted(model: PreTrainedModel, targets: tuple[str, ...]) -> PeftModel:
    """Put an adapter that changes something on a model."""
    peft = attach_fresh(model, LoraShape(4, 8.0, 0.0, targets), 0)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    return peft


def _round(peft: PeftModel, exact: PeftModel, found: Outcome) -> None:
    """Compare the distances of d2lora's and of the model's own numbers from the exact ones."""
    items = [Encoded(ids, len(ids) // 3) for ids in _rows(5, 6, 30, 1)]
    questions, pairs = _questions()
    answers = [Encoded((*q.prompt, *e), len(q.prompt)) for q in questions for e in q.endings]
    of_pairs = [item for pair in pairs for item in (pair.chosen, pair.rejected)]
    known, own = (
        [*_learnt(m, lambda m=m: torch.cat([_own(m, item) for item in items])),
         *(_sums(m, rows) for rows in (answers, of_pairs))]
        for m in (exact, peft)
    )  # fmt: skip
    for when in (True, False):
        with fast.enabled(peft, when=when) as used:
            scorer = TokenScorer(peft)
            said = [*_learnt(peft, lambda scorer=scorer: scorer(collate(items, 0)))]
            choices = continuation_scores(TokenScorer(peft), questions, 0)
            both = pair_log_probabilities(TokenScorer(peft).eval(), pairs, 0)
        said += [torch.tensor([*chain(*scores)]) for scores in (choices, both)]
        if when:
            found.training, found.fast_paths = scorer.way, used.names
        for what, exactly, theirs, ours in zip(
            ("tokens", "gradients", "multiple choice", "pairs"), known, own, said, strict=True
        ):
            least = 1e-3 * torch.finfo(peft.dtype).eps * exactly.norm()
            off = (ours - exactly).norm() / (theirs - exactly).norm().maximum(least)
            found.off[f"{what}, {'fast' if when else 'plain'}"] = float(off)


def _learnt(peft: PeftModel, scores_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities, and the gradient of their mean."""
    parameters = [p for p in peft.parameters() if p.requires_grad]
    scores_P = scores_of()
    slopes = torch.autograd.grad(scores_P.mean(), parameters, allow_unused=True)
    return scores_P.detach(), torch.cat([s.flatten().float() for s in slopes if s is not None])


@torch.no_grad()
def _sums(model: Any, rows: Sequence[Encoded]) -> Tensor:
    return torch.stack([_own(model, row).sum() for row in rows])


def _rows(n: int, shortest: int, longest: int, seed: int) -> list[tuple[int, ...]]:
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (n,), generator=chance).tolist()
    return [tuple(torch.randint(3, 90, (m,), generator=chance).tolist()) for m in lengths]


def _own(model: Any, item: Encoded) -> Tensor:
    """Return the log-probabilities of a row's supervised tokens as the model says them."""
    ids_1T = torch.tensor([item.ids])
    scores_TV = model(input_ids=ids_1T).logits[0].float().log_softmax(-1)
    places = torch.arange(item.n_prompt - 1, len(item.ids) - 1)
    return scores_TV[places, ids_1T[0, places + 1]]


def _train(peft: Any, found: Outcome) -> None:
    items = [Encoded(ids, len(ids) // 3) for ids in _rows(5, 6, 30, 1)]
    parameters = [p for p in peft.parameters() if p.requires_grad]

    def step(loss_of: Callable[[], Tensor]) -> tuple[float, list[Tensor | None]]:
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of()
        loss.backward()
        return float(loss.detach()), [None if p.grad is None else p.grad for p in parameters]

    known, known_slopes = step(lambda: -torch.cat([_own(peft, item) for item in items]).mean())
    for when in (True, False):
        with fast.enabled(peft, when=when) as used:
            scorer = TokenScorer(peft)
            loss, slopes = step(lambda scorer=scorer: -scorer(collate(items, 0)).mean())
        way = "fast" if when else "plain"
        found.off[f"loss, {way}"] = abs(loss - known) / known
        found.off[f"gradient, {way}"] = max(
            float((one - own).norm() / own.norm())
            for one, own in zip(slopes, known_slopes, strict=True)
            if own is not None and one is not None and float(own.norm()) > 1e-6
        )
        if when:
            found.training, found.fast_paths = scorer.way, used.names
    for parameter in parameters:
        parameter.grad = None


class _EndsEarly(Decoder):
    """A decoder that stops at a token as at EOS, so that rows leave a batch."""

    stop = 0

    @property
    def stop_ids(self) -> set[int]:
        """The token, too."""
        return {2, type(self).stop}


def _decode(peft: Any, found: Outcome) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE_DIR)
    base = Base(peft.get_base_model(), tokenizer, "tiny", None, "", Path())
    prompts = [list(ids) for ids in _rows(5, 3, 24, 2)]
    with torch.no_grad():
        known = [_continued(peft, prompt, 7) for prompt in prompts]
    _EndsEarly.stop = known[0][2]
    wanted = [_until(ids, {2, _EndsEarly.stop}) for ids in known]
    for when in (True, False):
        with fast.enabled(peft, when=when) as used:
            said = dict(_EndsEarly(peft, base, 7, 3).complete(prompts))
            if "Llama decoding" in used.names:
                found.fast_paths.append("Llama decoding")
        differing = sum(said[number] != ids for number, ids in enumerate(wanted))
        found.off[f"completions, {'fast' if when else 'plain'}"] = differing
    with merged(peft), fast.enabled(peft, when=True):
        said = dict(_EndsEarly(peft, base, 7, 3).complete(prompts))
    found.off["completions, folded"] = sum(said[n] != ids for n, ids in enumerate(wanted))
    found.decoding = _way_to_decode(peft.get_base_model(), prompts)


def _continued(model: Any, prompt: Sequence[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _until(ids: Sequence[int], stops: set[int]) -> list[int]:
    return list(ids[: next((n for n, token in enumerate(ids) if token in stops), len(ids))])


def _questions() -> tuple[list[Question], list[PreferencePair]]:
    questions = [
        Question(
            ids[: len(ids) // 3 + 4], tuple(e[: 4 + n] for n, e in enumerate(_rows(3, 8, 10, k)))
        )
        for k, ids in enumerate(_rows(5, 6, 30, 1))
    ]
    pairs = [
        PreferencePair(*(Encoded((*q.prompt, *e), len(q.prompt)) for e in q.endings[:2]))
        for q in questions
    ]
    return questions, pairs


def _score(peft: Any, found: Outcome) -> None:
    questions, pairs = _questions()
    with torch.no_grad():
        known = [
            [float(_own(peft, Encoded((*q.prompt, *e), len(q.prompt))).sum()) for e in q.endings]
            for q in questions
        ]
    for when in (True, False):
        way = "fast" if when else "plain"
        with fast.enabled(peft, when=when):
            choices = continuation_scores(TokenScorer(peft), questions, 0)
            both = pair_log_probabilities(TokenScorer(peft).eval(), pairs, 0)
        found.off[f"multiple choice, {way}"] = _farthest(known, choices)
        found.off[f"pairs, {way}"] = _farthest([scores[:2] for scores in known], both)


IDS_BT = torch.tensor([row[:20] for row in _rows(4, 20, 30, 3)][:2])


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(input_ids=IDS_BT, use_cache=False).logits.float()


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _differing(model: Any, known: dict[str, Tensor]) -> int:
    """Count the weights that are not, bit for bit, what they were."""
    state = model.state_dict()
    return sum(not torch.equal(state[name], weight) for name, weight in known.items())


def _fold(peft: PeftModel, found: Outcome) -> None:
    """Fold the adapter in, as for an evaluation, and take it out."""
    before = {name: weight.clone() for name, weight in peft.state_dict().items()}
    known = _logits(peft)
    with merged(peft):
        found.off["logits, folded"] = _apart(_logits(peft), known)
    found.off["weights, after folding"] = _differing(peft, before)


def _keep(kind: str, model: PreTrainedModel, peft: PeftModel, folder: Path, found: Outcome) -> None:
    """Save the adapter, load it here and by PEFT, and merge it into a base that is written."""
    known, path = _logits(peft), folder / "adapter"
    factors = {name: weight.clone() for name, weight in get_peft_model_state_dict(peft).items()}

    def compare(model: PeftModel, how: str) -> None:
        loaded = get_peft_model_state_dict(model)
        found.off[f"weights, {how}"] = sum(
            name not in loaded or not torch.equal(loaded[name], weight)
            for name, weight in factors.items()
        )
        # Some kernels round by where a tensor lies in memory.
        found.off[f"logits, {how}"] = _apart(_logits(model), known)

    save_adapter(peft, path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with attached(model, path) as again:
        compare(again, "loaded")
    found.off["weights, after loading"] = _differing(model, before)
    with peft_warnings_ignored():
        by_peft = PeftModel.from_pretrained(model, str(path))
    if kind not in MISLOADED_BY_PEFT:
        compare(by_peft, "loaded by PEFT")
    by_peft.unload()
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE_DIR)
    base = Base(model, tokenizer, kind, None, "", BASE_DIR)
    try:
        found.off["logits, merged and written"] = merge(base, path, folder / "merged", 0)
    except ModelError as error:
        found.not_merged = str(error)


def _resume(again: PeftModel, peft: PeftModel, folder: Path, found: Outcome) -> None:
    """Train three steps; then the third alone, from the checkpoint behind the second."""
    rows = [Encoded(ids, len(ids) // 3) for ids in _rows(6, 6, 20, 4)]
    settings = TrainSettings(max_steps=3, batch_size=2, checkpoint_every=2)
    ends = []
    for resume, model in ((False, peft), (True, again)):
        train(
            model, Lesson(rows, (), SFT(), 0), settings, RunFolder(folder), Reporter(quiet=True),
            resume=resume,
        )  # fmt: skip
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    found.off["weights, resumed"] = sum(
        not torch.equal(weight, ends[1][name]) for name, weight in ends[0].items()
    )


def _count(peft: PeftModel, found: Outcome) -> None:
    """Compare operations as a run counts them with torch's, of rows beyond all windows."""
    formula = TrainingFlops.of(peft)
    found.operations = "not known" if formula is None else "counted"
    if formula is None:
        return
    # torch does not count products of groups of rows.
    peft.get_base_model().set_experts_implementation("eager")
    ids_BT = torch.randint(3, 90, (2, 96))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = peft(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
        logits.sum().backward()
    counted = formula.of_rows(2, ids_BT.numel(), ids_BT.numel())
    found.off["operations"] = abs(counted / counter.get_total_flops() - 1)


def _farthest(known: Sequence[Sequence[float]], said: Sequence[Sequence[float]]) -> float:
    return max(
        abs(one - other)
        for own, theirs in zip(known, said, strict=True)
        for one, other in zip(own, theirs, strict=True)
    )


HEAD = """# Architectures

The causal language models of transformers {version}, built tiny with random weights and held
against their own forward pass: training loss and gradients, greedy completions of batches whose
rows end at different times, multiple choice, pairs; adapters folded in and taken out, saved and
loaded (by PEFT, too), merged, and resumed from a checkpoint. Written by `scripts/architectures.py`;
the same is a test (`tests/test_architectures.py`).

All of it once more with embeddings tied where they were not, biases, and another kind of RoPE
(linear, dynamic, YaRN, LongRoPE, Llama 3's), and in bfloat16 against the same weights in float32.

Experts in one tensor get an adapter where it is asked for, `--targets all-linear experts`, by
PEFT's `target_parameters`. Operations are those of torch's counter within 5 %, or "not known".

| architecture | training | decoding | operations | adapter of `all-linear` |
|---|---|---|---|---|"""


def described(kind: str) -> Outcome:
    """Return which paths a kind of model takes, and what is adapted, without comparing numbers."""
    model = tiny(kind)
    try:
        check_causal(model, kind)
    except ModelError as error:
        return Outcome(refused=str(error))
    peft = _adapted(model, ("all-linear",))
    items = [Encoded(ids, len(ids) // 3) for ids in _rows(5, 6, 30, 1)]
    with torch.no_grad(), fast.enabled(peft, when=True):
        scorer = TokenScorer(peft)
        scorer(collate(items, 0))
    prompts = [list(ids) for ids in _rows(5, 3, 24, 2)]
    is_counted = TrainingFlops.of(peft) is not None
    return Outcome(
        adapted=coverage(peft),
        training=scorer.way,
        decoding=_way_to_decode(model, prompts),
        operations="counted" if is_counted else "not known",
    )


def _way_to_decode(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> str:
    ends = sorted(prompts, key=len)
    with torch.inference_mode():
        made = steps_of(model, 0, (ends[0], ends[-1]), 2)
    return {
        "PaddedSteps": "rows padded", "EqualSteps": "rows of one length",
        "Recomputed": "each token anew",
    }[type(made()).__name__]  # fmt: skip


def main() -> None:
    """Print the table, or what was found of some kinds."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for kind in sys.argv[1:]:
            print(kind, held_against_itself(kind))
        return
    print(HEAD.format(version=transformers.__version__))
    for kind in KINDS:
        if kind in NOT_TINY:
            continue
        found = described(kind)
        if found.refused:
            print(f"| {kind} | refused | | | {found.refused.partition(': ')[2]} |")
        else:
            cells = kind, found.training, found.decoding, found.operations, found.adapted
            print(f"| {' | '.join(cells)} |")
    print("\nNot tried:\n")
    for reason in dict.fromkeys(NOT_TINY.values()):
        kinds = [kind for kind in KINDS if NOT_TINY.get(kind) == reason]
        print(f"- {', '.join(kinds)}: {reason}.")


if __name__ == "__main__":
    main()
