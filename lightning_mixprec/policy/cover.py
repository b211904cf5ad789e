"""Which layers of a model patterns cover, for arguments that are not rules."""

from collections.abc import Sequence

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy, Rule


def covered_layers(patterns: Sequence[str], model: nn.Module, argument: str) -> set[str]:
    """The layers that patterns match, and those below them.

    Args:
        patterns: Patterns as in a rule's ``layers``.
        model: The model.
        argument: What an error is to name, such as ``"AdaptivePrecision(pin=...)"``.

    >>> sorted(covered_layers(["1"], nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), "an argument"))
    ['1', '1.0']

    Raises:
        PolicyError: A pattern is malformed or matches nothing.
    """
    covered: set[str] = set()
    for pattern in patterns:
        try:
            assignment = PrecisionPolicy("fp16", [Rule(pattern, compute="fp32")]).resolve(model)
        except PolicyError as error:
            problem = str(error).removeprefix("rule 1 ").replace(" (allow_unmatched accepts it)", "")
            raise PolicyError(f"{argument}: {problem}") from None
        covered |= {name for name, layer in assignment.items() if layer.rule is not None}
    return covered
