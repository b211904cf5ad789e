"""``MixPrecCLI``: a LightningCLI that plans, compares and exports the model of a config as well as it fits it.

The three take the config of a fit. Their Trainer is the config's on one device in fp32, without its callbacks; the
policy of its plugin, or the format of its ``precision``, is what is compared and exported.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from lightning_mixprec.cli.commands import Commands
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.numerics.formats import REFERENCE, trained_in
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy

_OF_THE_CONFIG = {"model", "datamodule"}
_COMMANDS = ("plan", "compare", "export")

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


class MixPrecCLI(LightningCLI):
    """A LightningCLI with the further subcommands ``plan``, ``compare`` and ``export``.

    Each runs with the ``--config`` of a ``fit`` alone; ``--ckpt_path`` gives the model the weights of a checkpoint, and
    files go into the run's log directory unless ``--output`` says where. ``python train.py plan --help`` lists all
    options. Arguments are LightningCLI's; ``trainer_class`` has to be a class.

    Raises:
        MixPrecError: ``trainer_class`` is a function.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, and the arguments of each that come from the config."""
        return LightningCLI.subcommands() | dict.fromkeys(_COMMANDS, _OF_THE_CONFIG)

    def setup_parser(self, add_subcommands: bool, *args: Any, **kwargs: Any) -> None:
        """Set up the parser; the commands are methods of the Trainer, as ``fit`` is."""
        self._of_fit = self.trainer_class
        if add_subcommands:
            self.trainer_class = _with_commands(self._of_fit)
        super().setup_parser(add_subcommands, *args, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer: the user's own class for the subcommands of Lightning."""
        if self.subcommand not in _COMMANDS:
            self.trainer_class = self._of_fit
            return super().instantiate_trainer(**kwargs)
        policy = _policy_of(self._get(self.config_init, "trainer", default={}))
        trainer = super().instantiate_trainer(**(_ALONE | kwargs))
        assert isinstance(trainer, Commands)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # it is set in another class
        callbacks[:] = [each for each in callbacks if isinstance(each, SaveConfigCallback)]
        trainer.policy = policy
        return trainer


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
