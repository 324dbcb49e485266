"""Is the chosen completion of a pair the likelier one."""

from d2lora.evaluation.metrics.metric import Scores

PREFERENCE = ("preference_accuracy", "preference_accuracy_per_token")


def preference(log_probabilities: tuple[float, float], lengths: tuple[int, int]) -> Scores:
    """Score a pair: is the chosen completion likelier than the rejected one.

    Args:
        log_probabilities: Summed over the tokens of the chosen and the rejected completion.
        lengths: Their tokens, EOS included.
    """
    chosen, rejected = log_probabilities
    whole = float(chosen > rejected)
    return dict(
        zip(PREFERENCE, (whole, float(chosen / lengths[0] > rejected / lengths[1])), strict=True)
    )
