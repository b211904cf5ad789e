"""The Lightning that tests train with: ``lightning.pytorch``, or the package that MIXPREC_TEST_LIGHTNING names.

``MIXPREC_TEST_LIGHTNING=pytorch_lightning pytest tests/plugin tests/callbacks tests/evidence`` runs what is written
here with the other package's Trainer, modules, callbacks, loggers and strategies.
"""

import importlib
import os

pl = importlib.import_module(os.environ.get("MIXPREC_TEST_LIGHTNING", "lightning.pytorch"))


def _names(module, *names):
    found = importlib.import_module(f"{pl.__name__}.{module}")
    return [getattr(found, name) for name in names]


Callback, LightningDataModule, LightningModule, Trainer = (
    pl.Callback,
    pl.LightningDataModule,
    pl.LightningModule,
    pl.Trainer,
)
EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging = _names(
    "callbacks", "EMAWeightAveraging", "StochasticWeightAveraging", "WeightAveraging"
)
EarlyStopping, ModelCheckpoint, ModelSummary = _names("callbacks", "EarlyStopping", "ModelCheckpoint", "ModelSummary")
(LightningCLI,) = _names("cli", "LightningCLI")
CSVLogger, Logger = _names("loggers", "CSVLogger", "Logger")
(LightningEnvironment,) = _names("plugins.environments", "LightningEnvironment")
DoublePrecision, HalfPrecision, MixedPrecision, Precision = _names(
    "plugins.precision", "DoublePrecision", "HalfPrecision", "MixedPrecision", "Precision"
)
DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy = _names(
    "strategies", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "Strategy"
)
DeepSpeedStrategy, SingleDeviceStrategy, SingleDeviceXLAStrategy, XLAStrategy = _names(
    "strategies", "DeepSpeedStrategy", "SingleDeviceStrategy", "SingleDeviceXLAStrategy", "XLAStrategy"
)
(Tuner,) = _names("tuner", "Tuner")
(summarize,) = _names("utilities.model_summary", "summarize")
