"""The two packages that are Lightning: the one place that knows of both.

``pytorch_lightning`` is the code of ``lightning.pytorch`` under another name, and the classes of one are none of the
other: a Trainer takes plugins and callbacks of its own package alone. Ours are of both. A base class here inherits from
the class of that name in each package, and where the class of an object matters, :func:`both` gives the two to compare
with. Both packages are imported, whichever the user imports and when; the second takes little time beside the first.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero
from torch import nn
from torch.optim import Optimizer
from typing_extensions import TypeIs

from lightning_mixprec.errors import SupportError

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_SHARED = ("log", "rank_zero_deprecation_category")


def _packages() -> list[ModuleType]:
    """``lightning.pytorch``, and ``pytorch_lightning`` where there is one that can be imported.

    Each sets itself up as the one that the module they share logs for. It stays the one that was there before us, so
    that what a user says to its logger holds.
    """
    was_there = not sys.modules.keys().isdisjoint(_NAMES)
    before = {name: getattr(rank_zero, name) for name in _SHARED}
    found = [import_module(_NAMES[0])]
    kept = before if was_there else {name: getattr(rank_zero, name) for name in _SHARED}
    try:
        found.append(import_module(_NAMES[1]))
    except Exception:  # an old one beside a new torch may fail in any way, and nobody trains with it
        return found
    finally:
        for name, value in kept.items():
            setattr(rank_zero, name, value)
    return found


PACKAGES = _packages()


def both(module: str, name: str) -> tuple[type[Any], ...]:
    """The class of a name in a module of each package, for a check of an object's class.

    >>> [each.__module__ for each in both("strategies", "DDPStrategy")]
    ['lightning.pytorch.strategies.ddp', 'pytorch_lightning.strategies.ddp']
    """
    modules = [import_module(f"{package.__name__}.{module}") for package in PACKAGES]
    return tuple(getattr(each, name) for each in modules if hasattr(each, name))


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as Callback
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.plugins.precision import FSDPPrecision as FSDPPrecision
    from lightning.pytorch.plugins.precision import Precision as Precision
else:

    class Precision(*both("plugins.precision", "Precision")):
        """Base of precision plugins for the Trainers of both packages."""

        def _clip_gradients(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            """Clips as the model's package does; the other one takes it for no LightningModule, and clips nothing."""
            package = next((each for each in PACKAGES if isinstance(model, each.LightningModule)), PACKAGES[0])
            package.plugins.precision.Precision._clip_gradients(self, model, *args, **kwargs)

    class FSDPPrecision(*both("plugins.precision", "FSDPPrecision")):
        """Base of precision plugins for ``FSDPStrategy``."""

    class Callback(*both("callbacks", "Callback")):
        """Base of callbacks."""

    class DummyLogger(*both("loggers.logger", "DummyLogger")):
        """A logger that logs nothing."""


_MODULES = both("core", "LightningModule")
_OPTIMIZERS = both("core.optimizer", "LightningOptimizer")


def is_lightning_module(module: object) -> "TypeIs[pl.LightningModule]":
    """True for a LightningModule of either package."""
    return isinstance(module, _MODULES)


def check_lightning_module(module: nn.Module) -> "pl.LightningModule":
    """The module, if a Trainer runs it.

    Raises:
        SupportError: None does.
    """
    if not is_lightning_module(module) or module._trainer is None:
        raise SupportError(
            f"PerLayerPrecision got a {type(module).__name__} that no Trainer of lightning.pytorch or "
            "pytorch_lightning runs; pass the plugin to Trainer(plugins=...). Fabric is not supported."
        )
    return module


def raw(optimizer: Any) -> Optimizer:
    """The user's optimizer inside Lightning's wrapper."""
    own: Optimizer = optimizer.optimizer if isinstance(optimizer, _OPTIMIZERS) else optimizer
    return own
