import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mixprec.optim.skipped_buffers import BufferGuard, copy_each

SKIPPED = [pytest.param(True, id="read"), pytest.param(torch.tensor(1.0), id="on the device")]
TAKEN = [pytest.param(False, id="read"), pytest.param(torch.tensor(0.0), id="on the device")]


class Counting(nn.Module):
    """Buffers of several formats that forward changes, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("narrow", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("fixed", torch.arange(3.0))

    def forward(self, value: float) -> Tensor:
        with torch.no_grad():
            self.total += value
            self.count += 1
            self.narrow.add_(value)
            self.flag.logical_not_()
        return self.weight * value


def values(module: nn.Module) -> dict[str, object]:
    return {name: buffer.tolist() for name, buffer in module.named_buffers()}


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([param for module in modules for param in module.parameters()], lr=0.1)


def a_window(guard: BufferGuard, optimizer: torch.optim.Optimizer, skipped: bool | Tensor, run: object) -> None:
    guard.open()
    run()  # type: ignore[operator]
    guard.close(optimizer, skipped)


@pytest.mark.parametrize("skipped", SKIPPED)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_every_format_is_put_back_after_a_skip(before: int, skipped: bool | Tensor) -> None:
    model = Counting()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    for _ in range(before):
        a_window(guard, optimizer, False, lambda: model(1.0))
    expected = values(model)
    a_window(guard, optimizer, skipped, lambda: model(torch.nan))
    assert values(model) == expected


@pytest.mark.parametrize("taken", TAKEN)
def test_a_step_that_was_taken_keeps_what_forward_wrote(taken: bool | Tensor) -> None:
    model, oracle = Counting(), Counting()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    for _ in range(3):
        a_window(guard, optimizer, taken, lambda: model(1.0))
        oracle(1.0)
    assert values(model) == values(oracle)


def test_nan_that_a_taken_step_wrote_stays_what_it_is() -> None:
    model = Counting()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    a_window(guard, optimizer, torch.tensor(0.0), lambda: model(torch.nan))
    assert model.total.isnan().all()
    assert model.count == 1


def test_a_window_goes_on_until_its_optimizer_steps() -> None:
    model = Counting()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    a_window(guard, optimizer, False, lambda: model(1.0))
    for _ in range(3):
        guard.open()
        model(1.0)
    guard.close(optimizer, True)
    assert model.count == 1


def test_the_tensors_of_the_buffers_stay_the_same_objects() -> None:
    model = Counting()
    objects = list(map(id, model.buffers()))
    guard = BufferGuard(model, [optimizer := sgd(model)])
    for skipped in (False, True, torch.tensor(1.0)):
        a_window(guard, optimizer, skipped, lambda: model(1.0))
    assert list(map(id, model.buffers())) == objects


class Replacing(nn.Module):
    """Assigns new tensors of other shapes to its buffer, as streaming layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, value: float | None) -> None:
        self.seen = None if value is None else torch.cat([self.seen, torch.tensor([value])])


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("value", [3.0, None])
def test_a_buffer_that_was_replaced_is_put_back(before: int, value: float | None) -> None:
    model = Replacing()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    for index in range(before):
        a_window(guard, optimizer, False, lambda index=index: model(float(index)))
    a_window(guard, optimizer, True, lambda: model(value))
    assert model.seen.tolist() == [float(index) for index in range(before)]


@pytest.mark.parametrize("taken", TAKEN)
def test_a_buffer_that_grew_in_a_step_that_was_taken_stays_grown(taken: bool | Tensor) -> None:
    model = Replacing()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    for index in range(3):
        a_window(guard, optimizer, taken, lambda index=index: model(float(index)))
    assert model.seen.tolist() == [0.0, 1.0, 2.0]


def test_what_one_optimizers_step_kept_is_not_taken_back_by_anothers_skip() -> None:
    first, second = Counting(), Counting()
    model = nn.ModuleList([first, second])
    optimizers = sgd(first), sgd(second)
    guard = BufferGuard(model, optimizers)
    guard.open()
    first(1.0)
    guard.close(optimizers[0], False)
    guard.open()
    second(1.0)
    guard.close(optimizers[1], True)
    assert (first.count, second.count) == (1, 0)


def test_a_skip_takes_back_what_its_forward_wrote_into_other_optimizers_layers() -> None:
    first, second = Counting(), Counting()
    optimizers = sgd(first), sgd(second)
    guard = BufferGuard(nn.ModuleList([first, second]), optimizers)
    for skipped in (False, True):
        guard.open()
        first(1.0)
        second(1.0)
        guard.close(optimizers[0], skipped)
        guard.open()
        guard.close(optimizers[1], False)
    assert (first.count, second.count) == (1, 1)


def test_a_buffer_without_parameters_follows_the_module_around_it() -> None:
    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

    model = nn.ModuleList([nn.Sequential(nn.Linear(1, 1), Statistics()), nn.Sequential(nn.Linear(1, 1), Statistics())])
    optimizers = sgd(model[0]), sgd(model[1])
    guard = BufferGuard(model, optimizers)
    for optimizer in optimizers:
        guard.open()
        model[0][1].count += 1
        model[1][1].count += 1
        guard.close(optimizer, False)
    guard.open()
    model[0][1].count += 1
    guard.close(optimizers[0], False)
    guard.open()
    model[1][1].count += 1
    guard.close(optimizers[1], True)
    assert (model[0][1].count, model[1][1].count) == (3, 2)


def test_an_optimizer_the_guard_does_not_know_restores_and_closes_nothing_of_its_own() -> None:
    model = Counting()
    guard = BufferGuard(model, [sgd(model)])
    guard.open()
    model(1.0)
    guard.close(sgd(nn.Linear(1, 1)), True)
    assert model.count == 0


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.ModuleList(), Counting()], ids=["no buffers", "empty", "several"]
)
def test_a_guard_without_optimizers_does_nothing(model: nn.Module) -> None:
    guard = BufferGuard(model, [])
    guard.open()
    guard.close(sgd(nn.Linear(1, 1)), True)


def buffers_copied(guard: BufferGuard) -> int:
    return sum(len(window._saved) for window in guard._windows)


@pytest.mark.parametrize("skipped", [False, True])
def test_buffers_that_never_change_are_copied_once_only(skipped: bool) -> None:
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    for linear in model:
        linear.register_buffer("mask", torch.ones(1000, 10))
    optimizers = sgd(model[0]), sgd(model[1])
    guard = BufferGuard(model, optimizers)
    for outcome in (skipped, False, False):
        guard.open()
        for optimizer in optimizers:
            guard.close(optimizer, outcome)
    guard.open()
    assert buffers_copied(guard) == 0


def test_only_buffers_of_modules_that_change_some_are_copied() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.Linear(2, 2)])
    model[1].register_buffer("mask", torch.ones(1000, 10))
    guard = BufferGuard(model, [optimizer := sgd(model)])
    for _ in range(3):
        a_window(guard, optimizer, False, lambda: model[0](torch.randn(3, 2)))
    guard.open()
    assert {slot.name for slot, _ in guard._windows[0]._saved} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_a_buffer_that_begins_to_change_later_is_put_back_from_then_on() -> None:
    model = Counting()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    a_window(guard, optimizer, False, lambda: None)
    a_window(guard, optimizer, False, lambda: model(1.0))
    a_window(guard, optimizer, True, lambda: model(1.0))
    assert model.count == 1


def test_buffers_that_inference_mode_made_are_left_in_peace() -> None:
    model = Counting()
    with torch.inference_mode():
        model.total = torch.ones(2)
    guard = BufferGuard(model, [optimizer := sgd(model)])
    a_window(guard, optimizer, False, lambda: model.count.add_(1))
    a_window(guard, optimizer, False, lambda: model.count.add_(1))
    assert model.total.tolist() == [1.0, 1.0]


@pytest.mark.gpu
def test_on_cuda_a_flag_is_obeyed_without_being_read() -> None:
    model = nn.BatchNorm1d(2).cuda()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    batches = [torch.randn(4, 2, device="cuda") for _ in range(4)]
    flags = [torch.zeros((), device="cuda"), torch.ones((), device="cuda")]
    a_window(guard, optimizer, flags[0], lambda: model(batches[0]))
    expected = values(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        a_window(guard, optimizer, flags[1], lambda: model(batches[1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values(model) == expected


class Operations(TorchDispatchMode):
    """Counts the operations that move data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(word in str(func) for word in ("view", "split", "detach"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [2, 30])
def test_a_flag_on_the_device_is_obeyed_by_as_many_kernels_however_many_buffers_there_are(layers):
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = BufferGuard(model, [optimizer])
    for _ in range(2):
        guard.open()
        model(torch.randn(4, 3))
        with Operations() as operations:
            guard.close(optimizer, torch.zeros(()))
    assert operations.count <= 12


class ListsCopied(TorchDispatchMode):
    """The formats on both sides of each copy of a list: CUDA copies mixed ones tensor by tensor."""

    def __init__(self):
        super().__init__()
        self.formats = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._foreach_copy_.default:
            self.formats.append([{tensor.dtype for tensor in tensors} for tensors in args])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("skipped", [True, torch.tensor(1.0)], ids=["read", "on the device"])
def test_lists_of_buffers_that_are_copied_hold_one_format_each(skipped):
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(3)), Counting())
    guard = BufferGuard(model, [optimizer := sgd(model)])
    with ListsCopied() as lists:
        for _ in range(3):
            a_window(guard, optimizer, skipped, lambda: (model[:3](torch.randn(4, 3)), model[3](1.0)))
    assert lists.formats
    assert all(len(formats) == 1 for both in lists.formats for formats in both)
    assert {dtype for both in lists.formats for dtype in both[0]} == {
        torch.float32,
        torch.int64,
        torch.bfloat16,
        torch.bool,
    }


def test_a_list_of_mixed_formats_is_copied_as_each_alone():
    sources = [torch.randn(3), torch.arange(3), torch.randn(2, 2).bfloat16(), torch.tensor(True), torch.randn(0)]
    targets = [torch.zeros_like(source, dtype=torch.float64) for source in sources]
    copy_each(sources, targets)
    assert all(torch.equal(target, source.double()) for source, target in zip(sources, targets, strict=True))
    copy_each([], [])


@pytest.mark.gpu
def test_on_cuda_the_buffers_of_many_layers_are_copied_by_a_few_kernels() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(50))).cuda()
    guard = BufferGuard(model, [optimizer := sgd(model)])
    for _ in range(2):
        a_window(guard, optimizer, False, lambda: model(torch.randn(4, 3, device="cuda")))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        guard.open()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= 6
