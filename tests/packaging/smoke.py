"""What a built package must do where only its requirements can be imported; .ci/run runs it on wheel and sdist."""

import io
import json
import sys
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path

OPTIONAL = ("rich", "matplotlib", "jinja2", "scipy", "jsonargparse", "onnx", "onnxscript", "onnxruntime", "safetensors")


def main(where):
    import lightning.pytorch as pl
    import torch
    import torchmetrics  # noqa: F401  these look for what is installed themselves

    sys.modules.update(dict.fromkeys(OPTIONAL))  # None: for an import it is not there
    import lightning_mixprec
    from lightning_mixprec import OverflowMonitor, PerLayerPrecision, compare
    from lightning_mixprec.cli.console import main as mixprec

    assert Path(lightning_mixprec.__file__).is_relative_to(where), lightning_mixprec.__file__
    package = files("lightning_mixprec")
    for part in ("py.typed", "report/templates", "policy/written/policy.schema.json"):
        assert (package / part).exists(), part
    json.loads((package / "policy/written/policy.schema.json").read_text())

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Model()
    plugin = PerLayerPrecision({"default": "bf16", "layer": "fp32"})
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, plugins=plugin, callbacks=[OverflowMonitor()], **quiet)
    trainer.fit(model)
    assert trainer.global_step == 4
    assert compare(model, {"bf16": "bf16"}, [torch.ones(2, 4)] * 2).rows[0]["policy"] == "bf16"
    with redirect_stdout(io.StringIO()) as printed:
        assert mixprec(["formats"]) == 0 and mixprec(["doctor"]) == 0
    assert "bf16" in printed.getvalue()
    print(f"lightning_mixprec {lightning_mixprec.__version__} in {where}: trains, compares and tells, without extras")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
