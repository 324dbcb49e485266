"""Training objectives: a loss over a batch. The loop knows nothing else about them.

SFT learns completions; DPO (Rafailov et al. 2023, arXiv 2305.18290) and ORPO (Hong, Lee, Thorne
2024, arXiv 2403.07691) learn which of two is better. Names of settings and metrics are TRL's.
Shapes: B pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from d2lora.data.batches import Encoded, Item, PreferencePair, collate
from d2lora.scoring.pairs import PairScorer
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import ObjectiveSettings

T_contra = TypeVar("T_contra", bound=Item, contravariant=True)


class Share(NamedTuple):
    """The part that one micro-batch has in a batch's loss and metrics; the parts sum to them."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol[T_contra]):
    """A loss that is a sum over a batch's parts, so that micro-batches change nothing."""

    def share(
        self, scorer: TokenScorer, items: Sequence[T_contra], batch: Sequence[T_contra], pad_id: int
    ) -> Share:
        """Return what `items`, a part of `batch`, add to the batch's loss, with gradient."""
        ...


class SFT:
    """Supervised fine-tuning: mean cross-entropy, in nats, over the supervised tokens.

    Every supervised token of the optimizer batch weighs the same, as in TRL's SFTTrainer
    (`num_items_in_batch`), whatever the micro-batches.
    """

    def share(
        self, scorer: TokenScorer, items: Sequence[Encoded], batch: Sequence[Encoded], pad_id: int
    ) -> Share:
        """Return the negative log-probability of the items' tokens over the batch's tokens."""
        log_probability_P: Tensor = scorer(collate(items, pad_id).to(scorer.device))
        return Share(-log_probability_P.sum() / sum(item.n_supervised for item in batch), {})


@dataclass(frozen=True)
class DPO:
    """Direct preference optimization against log-probabilities of a reference policy.

    With the reward r = beta * log(policy / reference) of a completion and z = r_chosen -
    r_rejected, the mean over pairs of

        -(1 - e) log s(z) - e log s(-z)

    where s is the logistic function (eq. 7) and e is `label_smoothing` (conservative DPO,
    Mitchell 2023).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    scorer: PairScorer = field(default_factory=PairScorer)

    def share(
        self,
        scorer: TokenScorer,
        items: Sequence[PreferencePair],
        batch: Sequence[PreferencePair],
        pad_id: int,
    ) -> Share:
        """Return the items' part of the mean loss and of the rewards.

        Raises:
            ValueError: If a pair has no reference log-probabilities.
        """
        chosen_B, rejected_B = self.scorer(scorer, items, pad_id)
        reference_B2 = _reference(items).to(chosen_B.device)
        ratios_B2 = torch.stack([chosen_B, rejected_B], dim=1) - reference_B2
        z_B = self.beta * (ratios_B2[:, 0] - ratios_B2[:, 1])
        e = self.label_smoothing
        losses_B = (e - 1) * functional.logsigmoid(z_B) - e * functional.logsigmoid(-z_B)
        rewards_B2 = self.beta * ratios_B2.detach()
        metrics = _rewards(rewards_B2[:, 0], rewards_B2[:, 1], len(batch))
        metrics |= _log_probabilities(chosen_B, rejected_B, len(batch))
        return Share(losses_B.sum() / len(batch), metrics)


@dataclass(frozen=True)
class ORPO:
    """Odds ratio preference optimization: no reference policy.

    The cross-entropy of the chosen completions plus beta (the paper's lambda) times the mean over
    pairs of -log s(log odds ratio), eqs. 3 to 8; odds are those of the geometric mean probability
    of a completion's tokens. TRL takes the cross-entropy over the prompt too: `prompt_loss`.
    """

    beta: float = 0.1
    prompt_loss: bool = False
    scorer: PairScorer = field(default_factory=PairScorer)

    def share(
        self,
        scorer: TokenScorer,
        items: Sequence[PreferencePair],
        batch: Sequence[PreferencePair],
        pad_id: int,
    ) -> Share:
        """Return the items' part of both terms, each with its own weight."""
        chosen_B, rejected_B = self.scorer(scorer, items, pad_id)
        lengths_B2 = _lengths(items).to(chosen_B)
        chosen_mean_B = chosen_B / lengths_B2[:, 0]
        rejected_mean_B = rejected_B / lengths_B2[:, 1]
        if self.prompt_loss:
            whole = [replace(pair.chosen, n_prompt=0) for pair in items]
            likelihood = scorer(collate(whole, pad_id).to(chosen_B.device)).sum()
            n_tokens = sum(pair.chosen.n_tokens - 1 for pair in batch)
        else:
            likelihood = chosen_B.sum()
            n_tokens = sum(pair.chosen.n_supervised for pair in batch)
        cross_entropy = -likelihood / n_tokens
        log_odds_B = (
            chosen_mean_B
            - rejected_mean_B
            - (_log_complement(chosen_mean_B) - _log_complement(rejected_mean_B))
        )
        ratio_B = functional.logsigmoid(log_odds_B)
        n = len(batch)
        chosen_reward_B, rejected_reward_B = (
            self.beta * mean_B.detach() for mean_B in (chosen_mean_B, rejected_mean_B)
        )
        metrics = _rewards(chosen_reward_B, rejected_reward_B, n)
        metrics |= _log_probabilities(chosen_mean_B, rejected_mean_B, n)
        metrics |= {
            "nll_loss": cross_entropy.detach(),
            "log_odds_ratio": ratio_B.detach().sum() / n,
            "log_odds_chosen": log_odds_B.detach().sum() / n,
        }
        return Share(cross_entropy - self.beta * ratio_B.sum() / n, metrics)


def objective_of(settings: ObjectiveSettings) -> Objective[Any]:
    """Return the objective that the settings name."""
    if settings.objective == "dpo":
        return DPO(settings.beta, settings.label_smoothing)
    if settings.objective == "orpo":
        return ORPO(settings.beta, settings.orpo_prompt_loss)
    return SFT()


def _reference(items: Sequence[PreferencePair]) -> Tensor:
    values: list[tuple[float, float]] = []
    for pair in items:
        if pair.reference is None:
            raise ValueError("a pair has no reference log-probabilities")
        values.append(pair.reference)
    return torch.tensor(values)


def _lengths(items: Sequence[PreferencePair]) -> Tensor:
    return torch.tensor([(p.chosen.n_supervised, p.rejected.n_supervised) for p in items])


def _log_complement(log_p_B: Tensor) -> Tensor:
    """Return log(1 - p) of log p, exact near both ends (Maechler 2012); p = 1 is kept finite."""
    x = log_p_B.clamp(max=-1e-7)
    return torch.where(x > -0.6931472, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _rewards(chosen_B: Tensor, rejected_B: Tensor, n: int) -> dict[str, Tensor]:
    return {
        "rewards/chosen": chosen_B.sum() / n,
        "rewards/rejected": rejected_B.sum() / n,
        "rewards/accuracies": (chosen_B > rejected_B).float().sum() / n,
        "rewards/margins": (chosen_B - rejected_B).sum() / n,
    }


def _log_probabilities(chosen_B: Tensor, rejected_B: Tensor, n: int) -> dict[str, Tensor]:
    return {
        "logps/chosen": chosen_B.detach().sum() / n,
        "logps/rejected": rejected_B.detach().sum() / n,
    }
