"""Stand-ins for methods of a LightningModule that Lightning calls, where no hook of a plugin or callback will do."""

from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl


class StandIn:
    """Stands in for the method of a LightningModule that a subclass names in ``_METHOD``, until it is removed.

    A copy of the module has its own method alone.

    Args:
        module: The module.
        beside: What a subclass calls beside the method; None in a copy.
    """

    _METHOD: ClassVar[str]

    def __init__(self, module: pl.LightningModule, beside: Any) -> None:
        self._module, self._beside = module, beside
        self._of_instance = vars(module).get(self._METHOD)
        vars(module)[self._METHOD] = self

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method that the module had."""
        own = self._of_instance or partial(getattr(type(self._module), self._METHOD), self._module)
        return own(*args, **kwargs)

    def remove(self) -> None:
        """Gives the module back the method that it had."""
        attributes = vars(self._module)
        if attributes.get(self._METHOD) is self:
            del attributes[self._METHOD]
            if self._of_instance is not None:
                attributes[self._METHOD] = self._of_instance

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_beside": None}
