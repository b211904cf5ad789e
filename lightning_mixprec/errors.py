"""Every error a user can meet, each one self-contained line: what came, what is allowed, what to do.

::

    ValueError
    └── MixPrecError
        ├── FormatError        a number format that does not exist, or a tensor that cannot be rounded to one
        ├── PolicyError        a rule or policy is malformed, or does not fit the model
        ├── ScalingError       a loss-scaling option is invalid, or the loss scale cannot go on
        ├── PlanError          no choice of formats is within the budgets, or a plan does not fit the model
        ├── ExportError        a module that cannot be exported, or a file that is not what was promised
        ├── ReplayError        a step that cannot be replayed without a trace; none is left
        ├── TraceLeftError     a replay changed the training and it could not be put back
        ├── OtherRankError     a replay that another rank of the run could not go on with
        └── SupportError       a device, strategy or optimizer that is not supported
"""


class MixPrecError(ValueError):
    """Base of all errors that this package raises for its user."""


class FormatError(MixPrecError):
    """A number format that does not exist, or a tensor that cannot be rounded to one."""


class PolicyError(MixPrecError):
    """A rule or policy is malformed, or does not fit the model."""


class ScalingError(MixPrecError):
    """A loss-scaling option is invalid, or the loss scale cannot go on."""


class PlanError(MixPrecError):
    """No choice of formats is within the budgets, or a plan does not fit the model."""


class ExportError(MixPrecError):
    """A module that cannot be exported, or a file of it that is not what was promised; none is left."""


class NoLossError(MixPrecError):
    """A step that is to be compared gives no loss."""


class ReplayError(MixPrecError):
    """A step that cannot be replayed without a trace: what it left was put back, and no other step is tried."""


class TraceLeftError(MixPrecError):
    """A replay changed the training in a way that could not be put back; no monitor keeps it to itself."""


class OtherRankError(MixPrecError):
    """A replay that another rank could not go on with, whose messages this rank would have waited for.

    Args:
        message: Which rank, and why.
        is_out_of_memory: Whether that rank ran out of memory.
    """

    def __init__(self, message: str, is_out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.is_out_of_memory = is_out_of_memory


class SupportError(MixPrecError):
    """A device, strategy or optimizer that this package does not support."""


def one_line(error: Exception) -> str:
    """An error as a monitor tells of it.

    >>> one_line(KeyError("teacher"))
    "KeyError: 'teacher'"
    """
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {told}"
