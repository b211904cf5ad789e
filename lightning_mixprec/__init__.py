"""Per-layer precision for PyTorch Lightning.

>>> import lightning.pytorch as pl
>>> from lightning_mixprec import PerLayerPrecision, PrecisionPolicy
>>> policy = PrecisionPolicy.from_dict({
...     "default": "bf16",  # what no rule says
...     "model.head": "fp32",  # a layer, and all below it
...     "model.**.norm*": "c=fp32,o=input",  # compute in fp32, hand on in the format that came in
... })
>>> plugin = PerLayerPrecision(policy)
>>> trainer = pl.Trainer(accelerator="cpu", plugins=plugin, logger=False, barebones=True)
"""

import lightning_mixprec.plugin.lightnings  # noqa: F401  first: it notes which Lightning the user imported
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.callbacks.fidelity import FidelityMonitor
from lightning_mixprec.callbacks.overflow import OverflowMonitor
from lightning_mixprec.callbacks.report import PrecisionReport
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler
from lightning_mixprec.callbacks.underflow import UnderflowMonitor
from lightning_mixprec.deploy.compare import compare
from lightning_mixprec.deploy.export import export
from lightning_mixprec.deploy.plan import plan
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.by_hand import diagnose
from lightning_mixprec.numerics.metrics import SQNR, ExponentHistogram, OverflowRate, UnderflowRate
from lightning_mixprec.optim.loss_scaling_options import LossScaling
from lightning_mixprec.planning.plan import PrecisionPlan
from lightning_mixprec.plugin.fsdp import PerLayerFSDPPrecision
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule

__version__ = "0.2.0"

__all__ = [
    "SQNR",
    "AdaptivePrecision",
    "ExponentHistogram",
    "FidelityMonitor",
    "LossScaling",
    "MixPrecCLI",
    "MixPrecError",
    "OverflowMonitor",
    "OverflowRate",
    "PerLayerFSDPPrecision",
    "PerLayerPrecision",
    "PrecisionPlan",
    "PrecisionPolicy",
    "PrecisionReport",
    "PrecisionScheduler",
    "Rule",
    "UnderflowMonitor",
    "UnderflowRate",
    "compare",
    "diagnose",
    "export",
    "plan",
]


def __getattr__(name: str) -> object:
    """``MixPrecCLI`` is imported when it is asked for: it alone needs jsonargparse."""
    if name == "MixPrecCLI":
        from lightning_mixprec.cli.lightning_cli import MixPrecCLI

        return MixPrecCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
