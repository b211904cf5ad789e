"""``MixPrecCLI``: a LightningCLI that plans, compares and exports the model of a config as well as it fits it.

The three take the config of a fit. Their Trainer is the config's on one device in fp32, without its callbacks; the
policy of its plugin, or the format of its ``precision``, is what is compared and exported.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from lightning_mixprec.cli.commands import Commands
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.numerics.formats import REFERENCE, trained_in
from lightning_mixprec.plugin.lightnings import PACKAGES, both
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy

_OF_THE_CONFIG = {"model", "datamodule"}
_COMMANDS = ("plan", "compare", "export")
_SAVES = both("cli", "SaveConfigCallback")

_ALONE: dict[str, Any] = {
    "plugins": None,
    "precision": "32-true",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "callbacks": None,
    "fast_dev_run": False,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""What the Trainer of a command has otherwise than the config says."""


class _WithCommands:
    """What a LightningCLI of either package becomes a ``MixPrecCLI`` by."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        package = _package_of([*args, *kwargs.values()])
        if package is not None and not isinstance(self, _cli_of(package)):
            if type(self) is not MixPrecCLI:
                raise MixPrecError(
                    f"{type(self).__name__} got a class of {package.__name__}, and is a CLI of the other package; "
                    f"derive it from MixPrecCLI.for_package({package.__name__!r})."
                )
            self.__class__ = MixPrecCLI.for_package(package.__name__)
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, and the arguments of each that come from the config."""
        return LightningCLI.subcommands() | dict.fromkeys(_COMMANDS, _OF_THE_CONFIG)

    def setup_parser(self, add_subcommands: bool, *args: Any, **kwargs: Any) -> None:
        """Set up the parser; the commands are methods of the Trainer, as ``fit`` is."""
        own: Any = self
        cli: Any = super()
        self._of_fit = own.trainer_class
        if add_subcommands:
            own.trainer_class = _with_commands(self._of_fit)
        cli.setup_parser(add_subcommands, *args, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the Trainer: the user's own class for the subcommands of Lightning."""
        own: Any = self
        cli: Any = super()
        if own.subcommand not in _COMMANDS:
            own.trainer_class = self._of_fit
            return cli.instantiate_trainer(**kwargs)
        policy = _policy_of(own._get(own.config_init, "trainer", default={}))
        trainer = cli.instantiate_trainer(**(_ALONE | kwargs))
        trainer.callbacks[:] = [each for each in trainer.callbacks if isinstance(each, _SAVES)]
        trainer.policy = policy
        return trainer


class MixPrecCLI(_WithCommands, LightningCLI):
    """A LightningCLI with the further subcommands ``plan``, ``compare`` and ``export``.

    Each runs with the ``--config`` of a ``fit`` alone; ``--ckpt_path`` gives the model the weights of a checkpoint, and
    files go into the run's log directory unless ``--output`` says where. ``python train.py plan --help`` lists all
    options. Arguments are LightningCLI's; ``trainer_class`` has to be a class. Given classes of ``pytorch_lightning``,
    it is a CLI of that package.

    Raises:
        MixPrecError: ``trainer_class`` is a function, or a subclass is given classes of the other package.
    """

    @staticmethod
    def for_package(name: str) -> "type[MixPrecCLI]":
        """The class for a package, to be derived from.

        Args:
            name: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.

        Raises:
            MixPrecError: There is no such package.

        >>> MixPrecCLI.for_package("lightning.pytorch") is MixPrecCLI
        True
        """
        package = next((each for each in PACKAGES if each.__name__ == name), None)
        if package is None:
            known = " or ".join(repr(each.__name__) for each in PACKAGES)
            raise MixPrecError(f"MixPrecCLI.for_package got {name!r}; what is installed is {known}.")
        return _made_for(package)


@cache
def _made_for(package: ModuleType) -> type[MixPrecCLI]:
    if issubclass(MixPrecCLI, _cli_of(package)):
        return MixPrecCLI
    made: Any = type("MixPrecCLI", (_WithCommands, _cli_of(package)), {"__doc__": MixPrecCLI.__doc__})
    return made  # type: ignore[no-any-return]


def _cli_of(package: ModuleType) -> Any:
    return import_module(f"{package.__name__}.cli").LightningCLI


def _package_of(given: Sequence[Any]) -> ModuleType | None:
    """The package that the first class of a Trainer, a module or a datamodule is of."""
    names = ("Trainer", "LightningModule", "LightningDataModule")
    for each in filter(inspect.isclass, given):
        for package in PACKAGES:
            if issubclass(each, tuple(getattr(package, name) for name in names)):
                return package
    return None


def _with_commands(trainer_class: Any) -> type[pl.Trainer]:
    if not inspect.isclass(trainer_class):
        raise MixPrecError(
            f"MixPrecCLI got the trainer_class {getattr(trainer_class, '__name__', trainer_class)!r}, a function; give "
            "a subclass of Trainer, to which plan, compare and export are added."
        )
    return type(trainer_class.__name__, (Commands, trainer_class), {"__doc__": trainer_class.__doc__})


def _policy_of(config: Mapping[str, Any]) -> PrecisionPolicy:
    """The policy that a Trainer of these arguments would train with."""
    plugins = config.get("plugins") or ()
    for plugin in plugins if isinstance(plugins, (list, tuple)) else (plugins,):
        if isinstance(found := getattr(plugin, "configured_policy", None), PrecisionPolicy):
            return found
    precision = str(config.get("precision") or REFERENCE)
    return as_policy(trained_in(precision) or REFERENCE)
