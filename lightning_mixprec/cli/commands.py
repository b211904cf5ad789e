"""The commands of ``MixPrecCLI``, as methods of its Trainer; their signatures and docstrings are the options.

Each sets a run up as ``fit`` does and ends it before the first step (see ``deploy.prepared``).
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_mixprec.deploy.compare import by_the_first_with_a_loss, compare, steps_to_compare_by
from lightning_mixprec.deploy.evaluated_steps import Step
from lightning_mixprec.deploy.export import export
from lightning_mixprec.deploy.plan import plan
from lightning_mixprec.deploy.prepared import Data, check_count, prepared, prepared_run
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.plugin.lightnings import both
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy

_NO_FORWARD = {each.forward for each in both("core", "LightningModule")}
_SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "torchscript": ".pt", "weights": ".safetensors"}


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """A mistake ends the program with status 2 and one line, as that of a command line does."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (MixPrecError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    return run


if TYPE_CHECKING:
    _Trainer = pl.Trainer
else:
    _Trainer = object


class Commands(_Trainer):
    """What a Trainer of either package plans, compares and exports by.

    Attributes:
        policy: The policy that the config trains in.
    """

    policy: PrecisionPolicy

    @_told
    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        formats: Sequence[str] = ("bf16", "fp32"),
        device: str | None = None,
        budget: Mapping[str, float] | None = None,
        pin: Sequence[str] = (),
        batches: int = 4,
        seed: int = 0,
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> None:
        """Choose a format for every layer, measured on the first training batches.

        Args:
            model: The model.
            datamodule: Its data.
            formats: The formats to choose from.
            device: The GPU to plan for, by name ("h100"); null for the device that the model is on.
            budget: Any of loss_gap, time, memory (at most) and low_precision_share (at least); null for the cheapest
                that is no worse than 16 bits everywhere.
            pin: Patterns of layers that stay in fp32.
            batches: How many batches are measured.
            seed: Of what is drawn.
            ckpt_path: A checkpoint, for its weights.
            output: The file of the plan, whose policy goes beside it; null for plan.json in the run's log directory.
        """

        def work(module: pl.LightningModule, taken: list[Any]) -> Any:
            return plan(module, taken, formats=tuple(formats), device=device, budget=budget, pin=tuple(pin), seed=seed)

        made = prepared(self, model, work, datamodule=datamodule, batches=batches, ckpt_path=ckpt_path, is_quiet=False)
        path = self._path(output, "plan.json")
        made.to_file(path)
        policy = path.with_name(f"{path.stem}_policy.yaml")
        made.policy.to_file(policy)
        self._tell(str(made), path, policy)

    @_told
    def compare(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        policies: Mapping[str, str] | None = None,
        reference: str = "fp32",
        split: Data = "val",
        batches: int = 16,
        tolerance: float | None = None,
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> None:
        """Run the model in its policy and in others on the same batches, and say what that does to loss and time.

        Args:
            model: The model.
            datamodule: Its data.
            policies: By the name to be printed a policy's file or a format; null for the policy of the config.
            reference: What the others are compared with.
            split: Whose batches: train or val.
            batches: How many batches.
            tolerance: If given, the cheapest policy whose loss is at most this much larger is named.
            ckpt_path: A checkpoint, for its weights.
            output: The file of the comparison; null for comparison.json in the run's log directory.
        """
        compared = {name: as_policy(each) for name, each in (policies or {}).items()} or {"config": self.policy}

        def work(module: pl.LightningModule, taken: list[Any]) -> Any:
            def by(step: Step) -> Any:
                return compare(module, compared, taken, reference=reference, step=step)

            steps = steps_to_compare_by(module, None, is_validated=split == "val")
            return by_the_first_with_a_loss(steps, by)

        check_count("batches", batches)
        made = prepared_run(
            self, model, work, datamodule=datamodule, data=split, most=batches, ckpt_path=ckpt_path, is_quiet=False
        )
        path = self._path(output, "comparison.json")
        made.to_file(path)
        best = "" if tolerance is None else f"\nwithin {tolerance:g}: {made.best(tolerance) or 'none'}"
        self._tell(f"{made}{best}", path)

    @_told
    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        format: Literal["pt2", "aoti", "onnx", "torchscript", "weights"] = "pt2",
        opset: int | None = None,
        external_data: bool = False,
        bf16_as: Literal["fp32", "fp16"] | None = None,
        ranges: str | None = None,
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> None:
        """Write the model to a file that computes each layer in the format of the config's policy.

        Args:
            model: The model; its example_input_array is what is traced, or what its forward takes of the first batch.
            datamodule: Its data.
            format: The kind of file.
            opset: Of an ONNX file; null for torch's choice.
            external_data: Whether an ONNX file's weights are in a file beside it.
            bf16_as: What layers in bf16 become, for what runs the file and has no bf16.
            ranges: The mixprec.jsonl of a run with UnderflowMonitor, without which nothing becomes fp16.
            ckpt_path: A checkpoint, for its weights.
            output: The file; null for model.pt2, .onnx, .pt or .safetensors in the run's log directory.
        """
        path = self._path(output, f"model{_SUFFIXES[format]}")

        def work(module: pl.LightningModule, taken: list[Any]) -> Any:
            inputs = example_inputs(module, taken[0])
            return export(
                module,
                path,
                policy=self.policy,
                example_inputs=inputs,
                format=format,
                opset=opset,
                external_data=external_data,
                bf16_as=bf16_as,
                ranges=ranges,
            )

        made = prepared(self, model, work, datamodule=datamodule, batches=1, ckpt_path=ckpt_path, is_quiet=False)
        self._tell(str(made))

    def _path(self, output: str | None, name: str) -> Path:
        """Where a file goes: as the user says, a folder or the file itself; else into the run's log directory."""
        if output is None:
            return Path(self.log_dir or ".") / name
        path = Path(output).expanduser()
        return path / name if path.is_dir() or not path.suffix else path

    def _tell(self, text: str, *paths: Path) -> None:
        if self.is_global_zero:
            print("\n".join([text, *map(str, paths)]))


def example_inputs(module: pl.LightningModule, batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    """What ``forward`` takes: the module's ``example_input_array``, or the first parts of a batch.

    Raises:
        MixPrecError: The module has no ``forward``, or neither fits it.
    """
    if type(module).forward in _NO_FORWARD:
        raise MixPrecError(f"{type(module).__name__} has no forward, which is what is exported; give it one.")
    given = getattr(module, "example_input_array", None)
    if given is not None:
        return _as_inputs(module.transfer_batch_to_device(given, module.device, 0))
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = [each.name for each in parameters if each.name in named and each.default is each.empty]
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping) and set(needed) <= set(batch):
        return {name: batch[name] for name in named if name in batch}
    if isinstance(batch, (tuple, list)) and 0 < len(needed) <= len(batch):
        return tuple(batch[: len(needed)])
    raise MixPrecError(
        f"forward of {type(module).__name__} takes ({', '.join(named)}), and its batches are of another kind "
        f"({type(batch).__name__}); set self.example_input_array in the module."
    )


def _as_inputs(given: Any) -> tuple[Any, ...] | dict[str, Any]:
    return given if isinstance(given, dict) else tuple(given) if isinstance(given, (tuple, list)) else (given,)
