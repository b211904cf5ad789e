"""Exceptions that the evaluation of a step raises: who may know a remedy is asked, and the step is taken again.

Where numbers do not fit a format, code that checks them raises: a distribution that is given NaN, a factorization, an
index. The exception leaves as it came unless somebody has a remedy. In automatic optimization alone a step is a closure
that can be called again.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lightning_mixprec.optim.gradients import needs_closure

Remedy = Callable[[], None]
"""Changes what made the step raise; called before the step is taken again."""


class StepErrors:
    """Those who are asked when the evaluation of a step raises.

    Attributes:
        asked: Each is called with the exception, while weights and buffers are as before the step, and answers with a
            remedy or with None.
    """

    def __init__(self) -> None:
        self.asked: list[Callable[[Exception], Remedy | None]] = []
        self._raised: Exception | None = None

    def noting(self, closure: Callable[[], Any]) -> Any:
        """Calls a closure; what it raises is known for the evaluation's."""
        try:
            return closure()
        except Exception as error:
            self._raised = error
            raise

    def remedy(self, error: Exception, begin: Callable[[], None]) -> Remedy | None:
        """A remedy for an exception, if it is the evaluation's and somebody has one; all are asked before.

        Args:
            error: The exception.
            begin: Called before anybody is asked.
        """
        raised, self._raised = self._raised, None
        if error is not raised or not self.asked:
            return None
        begin()
        answers = [ask(error) for ask in self.asked]
        return next((answer for answer in answers if answer is not None), None)


def taken_again(step: Callable[..., Any]) -> Callable[..., Any]:
    """Has the plugin's ``optimizer_step`` begin anew where its evaluation raised and there is a remedy."""

    @functools.wraps(step)
    def optimizer_step(plugin: Any, optimizer: Optimizer, model: Any, closure: Any, **kwargs: Any) -> Any:
        hook = model._current_fx_name
        try:
            return step(plugin, optimizer, model, closure, **kwargs)
        except Exception as error:
            begin = functools.partial(_begin_anew, plugin, optimizer)
            remedy = None if needs_closure(optimizer) else plugin.step_errors.remedy(error, begin)
            if remedy is None:
                raise
        remedy()
        model._current_fx_name = hook
        return optimizer_step(plugin, optimizer, model, closure, **kwargs)

    return optimizer_step


def _begin_anew(plugin: Any, optimizer: Optimizer) -> None:
    """Ends a step whose evaluation raised: buffers go back to what they were before it."""
    plugin._formats.in_step = False
    if plugin._buffers is not None:
        plugin._buffers.close(optimizer, skipped=True)
