"""Decoding with a Llama on a CPU by a forward pass of its own: the same tokens, faster.

What transformers' pass costs beside the products and the attention that cannot be avoided is the
copying of keys and values, once to append them and once for every query head that shares them, and
products that leave the processor's widest registers unused. Here

- the cache is written in place, keys and values turned, so that attention is two batched products
  a layer in which the query heads of one key are the rows of one matrix (grouped-query attention,
  Ainslie et al. 2023, arXiv 2305.13245);
- q, k and v are one product, gate and up another; norms' weights and the attention's scale are
  folded into them, and oneDNN gets the weights in the order in which it reads them;
- prompts are computed a few at a time, padded on the right, where causality hides it, and only
  their last positions reach the head.

Shapes: B rows, T tokens, D hidden, H heads, K key-value heads, G = H / K, E head size, C columns of
the cache, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel

from d2lora.adapters.base import is_plain, weight_of
from d2lora.fast.matmul import packed, product
from d2lora.fast.probing import is_hooked

_PROMPT_TOKENS = 512
"""Padded prompt tokens in one pass: what it computes stays in the cache of one core."""
_BLOCK = 64
"""Columns by which the cache grows."""
_ROPES = {"default", "linear", "llama3"}
"""Rotary embeddings whose angles do not depend on the length of the text."""


@dataclass(frozen=True)
class _Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Llama:
    """A model's weights, laid out for decoding."""

    layers: Sequence[_Layer]
    head: Tensor
    embedding: Tensor
    rotary: nn.Module
    n_heads: int
    n_keys: int
    head_size: int
    epsilon: float

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel) -> "Llama | None":
        """Lay a model out; None where it is not a plain float32 Llama on a CPU.

        Adapters have to be merged. The weights are copied.
        """
        if not _fits(model):
            return None
        decoder: Any = model.model
        config: Any = model.config
        layers: list[_Layer] = []
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v, out = (weight_of(getattr(attention, f"{n}_proj")) for n in "qkvo")
            gate, up, down = (weight_of(getattr(mlp, f"{n}_proj")) for n in ("gate", "up", "down"))
            if any(weight is None for weight in (q, k, v, out, gate, up, down)):
                return None
            qkv = torch.cat([q * attention.scaling, k, v]) * layer.input_layernorm.weight
            gate_up = torch.cat([gate, up]) * layer.post_attention_layernorm.weight
            layers.append(_Layer(*map(packed, (qkv, out, gate_up, down))))
        head: Any = model.get_output_embeddings()
        return cls(
            layers,
            packed(head.weight * decoder.norm.weight),
            decoder.embed_tokens.weight,
            decoder.rotary_emb,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
        )

    def angles(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of positions, (N, 1, E) each."""
        like = torch.empty(0, dtype=torch.float32)
        cosine_1NE, sine_1NE = self.rotary(like, positions_N[None])
        sine_1NE[..., : self.head_size // 2] *= -1
        return cosine_1NE[0, :, None], sine_1NE[0, :, None]

    def heads(self, x_ND: Tensor, layer: _Layer, angles: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        """Return turned queries and keys, and values, of the normed x: (N, heads, E) each."""
        n_turned = self.n_heads + self.n_keys
        qkv_NHE = product(self.normed(x_ND), layer.qkv).view(len(x_ND), -1, self.head_size)
        both_NHE = qkv_NHE[:, :n_turned]
        cosine_N1E, sine_N1E = angles
        turned_NHE = both_NHE * cosine_N1E
        turned_NHE.addcmul_(both_NHE.roll(self.head_size // 2, -1), sine_N1E)
        return turned_NHE[:, : self.n_heads], turned_NHE[:, self.n_heads :], qkv_NHE[:, n_turned:]

    def rest(self, x_ND: Tensor, attended_ND: Tensor, layer: _Layer) -> Tensor:
        """Return x after the attention's output and the feed-forward block."""
        x_ND = x_ND + product(attended_ND, layer.out)
        gate_NF, up_NF = product(self.normed(x_ND), layer.gate_up).chunk(2, dim=-1)
        return x_ND.add_(product(functional.silu(gate_NF).mul_(up_NF), layer.down))

    def normed(self, x_ND: Tensor) -> Tensor:
        """Return x over its root mean square; the norm's weight is in the next product."""
        square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        return x_ND * square_N1.div_(x_ND.shape[-1]).add_(self.epsilon).rsqrt_()

    def logits(self, x_BD: Tensor) -> Tensor:
        """Return the logits after the last layer, (B, V)."""
        return product(self.normed(x_BD), self.head)


class LlamaSteps:
    """Prompts and what was decoded of them so far, as keys and values.

    A row's prompt is at the left of the cache; new tokens follow behind the longest prompt.
    """

    slack = 8
    pads = True
    """Ended rows are computed on until so many have gathered: leaving costs more than staying."""

    def __init__(self, llama: Llama) -> None:
        """Start without rows."""
        self._llama = llama

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts; return the logits behind each, (B, V)."""
        llama, n_rows = self._llama, len(prompts)
        lengths = [len(prompt) for prompt in prompts]
        self._positions_B = torch.tensor(lengths)
        self._column = max(lengths)
        capacity = self._column + _BLOCK
        shape = (len(llama.layers), 2, n_rows, llama.n_keys, llama.head_size, capacity)
        self._cache_L2BKEC = torch.empty(*shape)
        padding_BC = torch.arange(self._column) >= self._positions_B[:, None]
        self._hidden_B11C: Tensor | None = None
        if padding_BC.any():
            hidden_BC = torch.zeros(padding_BC.shape).masked_fill_(padding_BC, -torch.inf)
            # What the mask hides still has to be a number.
            self._hidden_B11C = hidden_BC[:, None, None]
            self._cache_L2BKEC[..., : self._column] = 0
        order = sorted(range(n_rows), key=lambda row: lengths[row])
        logits_BV = torch.empty(n_rows, len(llama.embedding))
        while order:
            group = order[-1:]
            fitting = max(1, _PROMPT_TOKENS // lengths[group[0]])
            group, order = order[-fitting:], order[:-fitting]
            logits_BV[group] = self._prompts([prompts[row] for row in group], torch.tensor(group))
        return logits_BV

    def _prompts(self, prompts: Sequence[Sequence[int]], rows_B: Tensor) -> Tensor:
        """Compute a few prompts, keep their keys and values, and return their logits."""
        llama = self._llama
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts])
        n_rows, longest = len(prompts), int(last_B.max()) + 1
        ids_BT = torch.zeros(n_rows, longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = torch.tensor(prompt)
        angles = llama.angles(torch.arange(longest).repeat(n_rows))
        x_ND = llama.embedding[ids_BT.flatten()]
        for number, layer in enumerate(llama.layers):
            q_BHTE, k_BKTE, v_BKTE = (
                heads.unflatten(0, (n_rows, longest)).transpose(1, 2)
                for heads in llama.heads(x_ND, layer, angles)
            )
            both_2BKET = torch.stack([k_BKTE, v_BKTE]).transpose(-1, -2)
            self._cache_L2BKEC[number, :, rows_B, ..., :longest] = both_2BKET
            attended_BHTE = functional.scaled_dot_product_attention(
                q_BHTE, k_BKTE, v_BKTE, is_causal=True, scale=1.0, enable_gqa=True
            )
            x_ND = llama.rest(x_ND, attended_BHTE.transpose(1, 2).reshape(len(x_ND), -1), layer)
        return llama.logits(x_ND.view(n_rows, longest, -1)[torch.arange(n_rows), last_B])

    def step(self, next_B: Tensor) -> Tensor:
        """Take one token a row; return the logits behind it, (B, V)."""
        llama, column = self._llama, self._column
        if column == self._cache_L2BKEC.shape[-1]:
            self._cache_L2BKEC = functional.pad(self._cache_L2BKEC, (0, _BLOCK))
        angles = llama.angles(self._positions_B)
        x_BD = llama.embedding[next_B]
        n_rows, seen = len(next_B), column + 1
        for number, layer in enumerate(llama.layers):
            q_BHE, k_BKE, v_BKE = llama.heads(x_BD, layer, angles)
            cache_2BKEC = self._cache_L2BKEC[number]
            cache_2BKEC[0, ..., column] = k_BKE
            cache_2BKEC[1, ..., column] = v_BKE
            keys_BKEC, values_BKEC = cache_2BKEC[..., :seen]
            q_BKGE = q_BHE.unflatten(1, (llama.n_keys, -1))
            scores_BKGC = q_BKGE @ keys_BKEC
            if self._hidden_B11C is not None:
                hidden_B11C = self._hidden_B11C
                scores_BKGC[..., : hidden_B11C.shape[-1]] += hidden_B11C
            attended_BKGE = scores_BKGC.softmax(-1) @ values_BKEC.transpose(-1, -2)
            x_BD = llama.rest(x_BD, attended_BKGE.reshape(n_rows, -1), layer)
        self._column += 1
        self._positions_B = self._positions_B + 1
        return llama.logits(x_BD)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop the other rows; return which row is now where.

        Rows from the end fill the holes, so that few have to be moved.
        """
        n_kept = len(rows)
        holes = sorted(set(range(n_kept)).difference(rows))
        movers = [row for row in rows if row >= n_kept]
        order = list(range(n_kept))
        for hole, row in zip(holes, movers, strict=True):
            order[hole] = row
        column, cache = self._column, self._cache_L2BKEC
        for hole, row in zip(holes, movers, strict=True):
            cache[:, :, hole, ..., :column] = cache[:, :, row, ..., :column]
        self._cache_L2BKEC = cache[:, :, :n_kept]
        self._positions_B = self._positions_B[order]
        if self._hidden_B11C is not None:
            self._hidden_B11C = self._hidden_B11C[order]
        return order


def _fits(model: PreTrainedModel) -> bool:
    """Say whether a model is what this module computes."""
    if type(model) is not LlamaForCausalLM or not is_plain(model):
        return False
    config: Any = model.config
    return (
        config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in _ROPES
        and not (config.attention_bias or config.mlp_bias)
        and not any(map(is_hooked, model.modules()))
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    )
