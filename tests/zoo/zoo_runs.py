"""Short runs of the zoo's networks: what they end with, to the last bit."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightnings import pl
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo_models import ANIMALS, Animal

STEPS = 3


class End(NamedTuple):
    """What a run ended with."""

    losses: list[float]
    state: dict[str, Tensor]


class Keeper(pl.LightningModule):
    """Trains a network on one batch, again and again."""

    def __init__(self, animal: Animal, compile_with: str | None = None, wide: str | None = None) -> None:
        super().__init__()
        self.network, self.losses = animal.network, list[float]()
        self._loss, self._batch = animal.loss, animal.batch
        if compile_with is not None:
            self.network.eval()  # compiled code rounds the gradient of dropout in 16 bits otherwise than eager code
            self.network.compile(backend=compile_with)
        if wide is not None:
            compute_wide(self.get_submodule(wide))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(self.network, batch)
        self.losses.append(loss.detach().item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        batches: Any = [copy.deepcopy(self._batch) for _ in range(STEPS)]
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def caught(name: str) -> Animal:
    """A network of the zoo, the same at every call."""
    torch.manual_seed(0)
    return ANIMALS[name]()


def run(
    name: str,
    folder: Any,
    *,
    plugins: Any = None,
    precision: str | None = None,
    callbacks: Sequence[Any] = (),
    compile_with: str | None = None,
    wide: str | None = None,
) -> End:
    """Trains a network under a plugin of ours or a precision of Lightning's, there with a part that is wide by hand."""
    torch.compiler.reset()
    keeper = Keeper(caught(name), compile_with, wide)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of code that nobody here wrote
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            plugins=plugins,
            precision=precision,
            callbacks=list(callbacks),
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        torch.manual_seed(1)
        trainer.fit(keeper)
    return End(list(keeper.losses), {key: value.clone() for key, value in keeper.state_dict().items()})


def compute_wide(module: nn.Module) -> None:
    """Has a module compute in fp32 as torch's documentation of autocast says to do it by hand."""
    forward = module.forward

    def wide(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(*_to_fp32(args), **_to_fp32(kwargs))

    module.forward = wide  # type: ignore[method-assign]


def _to_fp32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(map(_to_fp32, value))
    return {key: _to_fp32(item) for key, item in value.items()} if type(value) is dict else value


def middle(network: nn.Module) -> str:
    """The name, below the LightningModule, of a module with weights near the middle; one with children, if there is."""
    weighted = {name: module for name, module in network.named_modules() if name and list(module.parameters())}
    called = {
        name: module for name, module in weighted.items() if not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }
    names = [name for name, module in called.items() if list(module.children())] or list(called)
    return f"network.{names[len(names) // 2]}"


def differences(one: End, other: End) -> list[str]:
    """The names of what is not the same to the last bit."""
    found = [] if one.losses == other.losses else [f"losses {one.losses} and {other.losses}"]
    return found + [key for key, value in one.state.items() if not same(value, other.state[key])]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
