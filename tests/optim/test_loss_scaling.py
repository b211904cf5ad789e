import copy
import math
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mixprec.errors import ScalingError
from lightning_mixprec.optim import loss_scaling as scaling
from lightning_mixprec.optim.loss_scaling import LossScaler
from lightning_mixprec.optim.loss_scaling_options import LossScaling

EVERY_OPTION_OFF_ITS_DEFAULT = LossScaling(
    init_scale=8.0,
    growth_factor=4.0,
    backoff_factor=0.25,
    growth_interval=3,
    min_scale=0.5,
    max_scale=64.0,
    hysteresis=2,
    at_min="warn",
    max_consecutive_skips=7,
)


def parameter(value: float = 1.0, grad: float | None = 0.0) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.full((3,), value))
    param.grad = None if grad is None else torch.full((3,), grad)
    return param


def sgd(*params: torch.nn.Parameter, **options: object) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=1.0, **options)


def a_step(scaler: LossScaler, optimizer: torch.optim.Optimizer, grad: float) -> bool:
    """One batch: backward gives gradients ``scale * grad``; step and update."""
    scaler.scale(torch.zeros(()))
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, grad * scaler.get_scale())
    skipped = scaler.step(optimizer)
    scaler.update()
    return bool(skipped)


@dataclass
class Model:
    """The algorithm of the module's docstring in plain Python."""

    options: LossScaling
    scale: float
    good: int = 0
    overflows: int = 0

    def batch(self, overflow: bool) -> None:
        if overflow:
            self.good = 0
            self.overflows += 1
            if self.overflows >= self.options.hysteresis:
                self.scale *= self.options.backoff_factor
        else:
            self.good += 1
            if self.good == self.options.growth_interval:
                self.good = self.overflows = 0
                self.scale *= self.options.growth_factor
        self.scale = min(max(self.scale, self.options.min_scale), self.options.max_scale)


options = st.builds(
    LossScaling,
    init_scale=st.sampled_from([1.0, 1024.0, 65536.0]),
    growth_factor=st.sampled_from([2.0, 4.0]),
    backoff_factor=st.sampled_from([0.5, 0.125]),
    growth_interval=st.integers(1, 4),
    min_scale=st.sampled_from([2.0**-14, 1.0]),
    max_scale=st.sampled_from([65536.0, 2.0**24]),
    hysteresis=st.integers(1, 3),
)


@settings(deadline=None, max_examples=60)
@given(options=options, overflows=st.lists(st.booleans(), max_size=25))
def test_the_scale_follows_a_plain_python_model_and_skipped_steps_move_nothing(
    options: LossScaling, overflows: list[bool]
) -> None:
    scaler, model = LossScaler(options), Model(options, options.init_scale)
    param = parameter()
    optimizer = sgd(param, momentum=0.9)
    for overflow in overflows:
        before = param.detach().clone(), copy.deepcopy(optimizer.state_dict())
        skipped = a_step(scaler, optimizer, math.inf if overflow else 0.001)
        assert skipped == overflow
        if overflow:
            assert torch.equal(param, before[0])
            assert repr(optimizer.state_dict()) == repr(before[1])
        model.batch(overflow)
        assert scaler.get_scale() == model.scale


def test_with_default_options_the_scale_is_that_of_torchs_grad_scaler() -> None:
    ours = LossScaler(replace(LossScaling(), growth_interval=5))
    torchs = torch.amp.GradScaler("cpu", growth_interval=5)
    params = parameter(), parameter()
    optimizers = sgd(params[0]), sgd(params[1])
    for step in range(40):
        overflow = step % 7 == 0
        torchs.scale(torch.zeros(()))
        a_step(ours, optimizers[0], math.nan if overflow else 0.1)
        params[1].grad = torch.full_like(params[1], math.nan if overflow else 0.1 * torchs.get_scale())
        torchs.step(optimizers[1])
        torchs.update()
        assert ours.get_scale() == torchs.get_scale()
        assert torch.equal(params[0], params[1])


def test_endless_overflow_never_reaches_zero() -> None:
    scaler = LossScaler(LossScaling(at_min="warn"))
    optimizer = sgd(parameter())
    for _ in range(200):
        a_step(scaler, optimizer, math.inf)
    assert scaler.get_scale() == 2.0**-14
    assert scaler.is_at_minimum()


def test_a_late_optimizer_unscales_by_the_scale_its_gradients_were_made_with() -> None:
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    first, second = parameter(), parameter()
    scaler.scale(torch.zeros(()))
    first.grad, second.grad = torch.full((3,), math.inf), torch.full((3,), 512.0)
    scaler.step(sgd(first))
    scaler.step(sgd(second))
    scaler.update()
    assert second.tolist() == [0.5] * 3
    assert scaler.get_scale() == 512.0


def test_gradients_that_wait_for_a_later_step_follow_the_scale() -> None:
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    stepping, waiting = sgd(parameter()), sgd(late := parameter())
    a_step_of(scaler, stepping, math.inf, waiting, late, 0.5)
    assert scaler.get_scale() == 512.0
    assert late.grad is not None
    late.grad += 0.25 * 512.0
    scaler.step(waiting)
    assert late.tolist() == [0.25] * 3


def a_step_of(
    scaler: LossScaler,
    stepping: torch.optim.Optimizer,
    grad: float,
    waiting: torch.optim.Optimizer,
    late: torch.nn.Parameter,
    late_grad: float,
) -> None:
    scaler.scale(torch.zeros(()))
    for param in stepping.param_groups[0]["params"]:
        param.grad = torch.full_like(param, grad)
    late.grad = torch.full_like(late, late_grad * scaler.get_scale())
    scaler.step(stepping)
    scaler.update(waiting=[stepping, waiting])


def test_waiting_gradients_are_not_taken_for_stepped_ones_that_were_freed() -> None:
    stepping, waiting = ([torch.nn.Parameter(torch.zeros(1)) for _ in range(20)] for _ in range(2))
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    optimizers = sgd(*stepping), sgd(*waiting)
    scaler.scale(sum(stepping) * math.inf + sum(waiting)).sum().backward()
    scaler.step(optimizers[0])
    optimizers[0].zero_grad()
    scaler.update(optimizers)
    assert [param.grad.item() for param in waiting if param.grad is not None] == [512.0] * 20


def test_two_optimizers_that_share_a_parameter_unscale_it_once() -> None:
    scaler = LossScaler(LossScaling(init_scale=4.0))
    shared = parameter()
    scaler.scale(torch.zeros(()))
    shared.grad = torch.full((3,), 1.0)
    scaler.step(sgd(shared))
    scaler.step(sgd(shared))
    scaler.update()
    assert shared.tolist() == [0.5] * 3


def test_gradients_that_another_optimizer_has_unscaled_follow_no_scale() -> None:
    shared, own, other = (parameter(0.0) for _ in range(3))
    first, second, third = sgd(shared), sgd(shared, own), sgd(other)
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    scaler.scale(shared.sum() + own.sum() + other.sum() * math.inf).backward()
    scaler.step(first)
    scaler.step(third)
    scaler.update([first, second, third])
    scaler.step(second)
    assert shared.tolist() == [-2.0] * 3
    assert own.tolist() == [-1.0] * 3


def test_an_optimizer_may_step_several_times_before_an_update() -> None:
    scaler = LossScaler(LossScaling(init_scale=4.0))
    optimizer = sgd(param := parameter())
    for _ in range(3):
        scaler.scale(torch.zeros(()))
        param.grad = torch.full((3,), 1.0)
        scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [0.25] * 3


def test_unscaling_is_done_once_however_often_it_is_asked_for() -> None:
    scaler = LossScaler(LossScaling(init_scale=4.0))
    optimizer = sgd(param := parameter(grad=4.0))
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)
    assert param.grad is not None and param.grad.tolist() == [1.0] * 3


def test_an_optimizer_without_gradients_steps_and_does_not_count_as_evidence() -> None:
    scaler = LossScaler(LossScaling(growth_interval=1))
    optimizer = sgd(parameter(grad=None))
    assert scaler.step(optimizer) is False
    scaler.update()
    assert scaler.get_scale() == 65536.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_gradients_of_every_format_are_unscaled_and_checked(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = sgd(param)
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    scaler.scale(torch.zeros(()))
    param.grad = torch.full_like(param, 512.0)
    assert scaler.step(optimizer) is False
    assert torch.equal(param, torch.full_like(param, 0.5))
    scaler.scale(torch.zeros(()))
    param.grad = torch.full_like(param, math.nan)
    assert scaler.step(optimizer) is True
    assert torch.equal(param, torch.full_like(param, 0.5))


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_are_unscaled_and_checked(coalesced: bool) -> None:
    param = torch.nn.Parameter(torch.ones(4, 2))
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    optimizer = sgd(param)
    scaler.scale(torch.zeros(()))
    grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.full((2, 2), 256.0), (4, 2), check_invariants=True)
    param.grad = grad.coalesce() if coalesced else grad
    assert scaler.step(optimizer) is False
    assert param[:, 0].tolist() == [1.0, 0.5, 1.0, 1.0]
    param.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.full((1, 2), math.inf), (4, 2), check_invariants=True
    )
    assert scaler.step(optimizer) is True


def test_without_options_nothing_is_scaled_and_steps_are_guarded() -> None:
    scaler = LossScaler(None, guards=True)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    assert scaler.get_scale() == 1.0
    optimizer = sgd(param := parameter(grad=math.nan))
    assert scaler.step(optimizer) is True
    assert param.tolist() == [1.0] * 3


def test_without_options_and_guard_nothing_is_looked_at() -> None:
    scaler = LossScaler(None, guards=False)
    optimizer = sgd(param := parameter(grad=math.nan))
    assert scaler.step(optimizer) is False
    assert param.isnan().all()


def test_guarding_leaves_every_bit_of_the_gradients() -> None:
    bits = torch.randint(0, 2**31 - 1, (100_000,), dtype=torch.int32)
    grad = bits.view(torch.float32)
    grad = grad[grad.isfinite()]
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad.clone()
    LossScaler(None).unscale_(sgd(param))
    assert torch.equal(param.grad.view(torch.int32), grad.view(torch.int32))


def fused_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fused optimizers obey the flag on the device, as on CUDA, instead of reading it."""
    monkeypatch.setattr(scaling, "_is_read", lambda optimizer, _: not scaling.obeys_found_inf(optimizer))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
def test_fused_optimizers_obey_the_flag_without_its_being_read(
    kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused_on_the_device(monkeypatch)
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    param = parameter()
    optimizer = kind([param], lr=0.1, fused=True)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip(f"fused {kind.__name__} of torch {torch.__version__} does not obey the flag")
    scaler.scale(torch.zeros(()))
    param.grad = torch.full((3,), 512.0)
    assert not torch.as_tensor(scaler.step(optimizer)).item()
    before = param.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    param.grad = torch.full((3,), math.inf)
    outcome = scaler.step(optimizer)
    assert isinstance(outcome, torch.Tensor) and outcome.item() == 1
    assert torch.equal(param, before[0])
    assert repr(optimizer.state_dict()["state"]) == repr(before[1])
    scaler.update()
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_fused_momentum_is_sound_after_a_skipped_first_step(dampening: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_on_the_device(monkeypatch)
    results = []
    for fused in (True, False):
        scaler = LossScaler(LossScaling(init_scale=4.0))
        param = parameter()
        optimizer = sgd(param, momentum=0.9, dampening=dampening, fused=fused)
        for grad in (math.inf, 1.0, 1.0, math.inf, 1.0):
            a_step(scaler, optimizer, grad)
        results.append(param.detach())
    assert torch.equal(results[0], results[1])


def test_state_goes_round_with_every_counter_off_its_start() -> None:
    scaler = LossScaler(EVERY_OPTION_OFF_ITS_DEFAULT)
    optimizer = sgd(parameter())
    for grad in (math.inf, math.inf, 1.0, 1.0):
        a_step(scaler, optimizer, grad)
    state = scaler.state_dict()
    assert state == {"scale": 2.0, "growth_tracker": 2, "overflows": 2}
    restored = LossScaler(EVERY_OPTION_OFF_ITS_DEFAULT)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    for each in (scaler, restored):
        a_step(each, optimizer, 1.0)
    assert restored.state_dict() == scaler.state_dict() == {"scale": 8.0, "growth_tracker": 0, "overflows": 0}


def test_the_state_of_torchs_grad_scaler_is_taken_over() -> None:
    stock = torch.amp.GradScaler("cpu", init_scale=128.0)
    stock.load_state_dict(stock.state_dict() | {"_growth_tracker": 11})
    scaler = LossScaler(LossScaling())
    scaler.load_state_dict(stock.state_dict())
    assert scaler.state_dict() == {"scale": 128.0, "growth_tracker": 11, "overflows": 0}


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf, -1.0])
def test_a_collapsed_scale_is_not_taken_over(scale: float) -> None:
    scaler = LossScaler(LossScaling())
    with pytest.warns(UserWarning, match="had collapsed"):
        scaler.load_state_dict({"scale": scale})
    assert scaler.get_scale() == 65536.0


def test_a_static_scale_stays_whatever_happens() -> None:
    scaler = LossScaler(LossScaling.from_value(128))
    optimizer = sgd(parameter())
    for grad in (math.inf, 0.1, 0.1, math.nan):
        a_step(scaler, optimizer, grad)
    scaler.load_state_dict({"scale": 4.0})
    assert scaler.get_scale() == 128.0
    assert not scaler.is_at_minimum()


def test_scaling_that_is_turned_off_or_on_takes_waiting_gradients_along() -> None:
    scaler = LossScaler(LossScaling(init_scale=8.0))
    optimizer = sgd(param := parameter(grad=None))
    param.grad = torch.ones(3) * scaler.scale(torch.ones(()))
    scaler.configure(None, [optimizer])
    assert param.grad.tolist() == [1.0] * 3
    scaler.configure(LossScaling(init_scale=16.0), [optimizer])
    assert param.grad.tolist() == [16.0] * 3
    scaler.step(optimizer)
    assert param.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"init_scale": -1}, "init_scale is -1"),
        ({"init_scale": 0}, "init_scale is 0"),
        ({"init_scale": math.nan}, "init_scale is nan"),
        ({"init_scale": math.inf}, "init_scale is inf"),
        ({"init_scale": True}, "init_scale is True"),
        ({"init_scale": "65536"}, "init_scale is '65536'"),
        ({"init_scale": 1e39}, "fp32 holds"),
        ({"init_scale": 1e-46, "min_scale": 1e-46}, "fp32 holds"),
        ({"backoff_factor": 1e-320}, "fp32 holds"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"growth_interval": 1.5}, "positive integer"),
        ({"hysteresis": 0}, "hysteresis is 0"),
        ({"max_consecutive_skips": -3}, "max_consecutive_skips is -3"),
        ({"growth_factor": 1.0}, "above 1"),
        ({"backoff_factor": 1.0}, "below 1"),
        ({"min_scale": 2.0, "init_scale": 1.0}, "not between"),
        ({"max_scale": 2.0, "init_scale": 4.0}, "not between"),
        ({"at_min": "ignore"}, "at_min is 'ignore'"),
        ({"grow_interval": 3}, "unknown option 'grow_interval'"),
        (True, "loss_scaling is True"),
        (0, "a static scale is 0"),
        (-2.0, "a static scale is -2.0"),
        (1e-45, "a static scale is 1e-45"),
        ("big", "loss_scaling is 'big'"),
        (None, "loss_scaling is None"),
    ],
)
def test_invalid_options_are_refused_in_one_line(value: object, message: str) -> None:
    with pytest.raises(ScalingError) as error:
        LossScaling.from_value(value)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_go_round_as_a_mapping() -> None:
    assert LossScaling.from_value(asdict(EVERY_OPTION_OFF_ITS_DEFAULT)) == EVERY_OPTION_OFF_ITS_DEFAULT


def test_a_step_cut_short_leaves_no_evidence_behind() -> None:
    scaler = LossScaler(LossScaling(init_scale=8.0))
    optimizer = sgd(param := parameter())
    scaler.scale(torch.zeros(()))
    param.grad = torch.full((3,), math.inf)
    scaler.unscale_(optimizer)
    scaler.forget_steps()
    a_step(scaler, optimizer, 1.0)
    assert scaler.get_scale() == 8.0
    assert param.tolist() == [0.0] * 3


@pytest.mark.gpu
def test_a_fused_step_on_cuda_waits_for_nothing() -> None:
    scaler = LossScaler(LossScaling(init_scale=1024.0))
    param = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grad in (1.0, math.inf, 1.0):
            loss = scaler.scale(torch.ones((), device="cuda"))
            param.grad = torch.ones_like(param) * loss * grad
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scaler.get_scale() == 512.0
    assert torch.isfinite(param).all()


def moves_or_batches(options: LossScaling) -> st.SearchStrategy[list[float | bool]]:
    """Batches (whether they overflow) and moves of the scale, some beyond the bounds."""
    moves = st.sampled_from([options.min_scale / 4, options.min_scale, 3.0, 1024.0, options.max_scale * 2])
    return st.lists(st.booleans() | moves, max_size=24)


@given(st.data(), options, st.booleans())
def test_a_moved_scale_is_searched_for_from_there(data: st.DataObject, options: LossScaling, used: bool) -> None:
    scaler, model = LossScaler(options), Model(options, options.init_scale)
    optimizer = sgd(parameter())
    if used:
        scaler.scale(torch.zeros(()))
    for event in data.draw(moves_or_batches(options)):
        if isinstance(event, bool):
            a_step(scaler, optimizer, math.inf if event else 0.001)
            model.batch(event)
        else:
            scaler.move_to(event)
            model = Model(options, min(max(event, options.min_scale), options.max_scale))
        assert scaler.state_dict() == {
            "scale": model.scale,
            "growth_tracker": model.good,
            "overflows": model.overflows if options.hysteresis > 1 else 0,
        }


@pytest.mark.parametrize("used", [True, False])
def test_waiting_gradients_follow_a_scale_that_is_moved(used: bool) -> None:
    scaler = LossScaler(LossScaling(init_scale=8.0))
    waiting, clipped = sgd(late := parameter()), sgd(done := parameter())
    if used:
        scaler.scale(torch.zeros(()))
    late.grad, done.grad = torch.full((3,), 4.0), torch.full((3,), 4.0)
    scaler.unscale_(clipped)
    scaler.move_to(2.0, [waiting, clipped])
    scaler.step(waiting)
    scaler.step(clipped)
    assert late.tolist() == done.tolist() == [0.5] * 3


def test_whoever_holds_the_present_scale_sees_it_move() -> None:
    scaler = LossScaler(LossScaling())
    scaler.scale(torch.zeros(()))
    held = scaler.present_scale
    scaler.move_to(2)
    assert scaler.present_scale is held
    assert float(held) == scaler.get_scale() == 2.0


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, True, "8", None])
def test_what_is_no_scale_is_refused_in_one_line(scale: object) -> None:
    scaler = LossScaler(LossScaling())
    with pytest.raises(ScalingError, match="a positive finite number") as error:
        scaler.move_to(scale)  # type: ignore[arg-type]
    assert repr(scale) in str(error.value) and "\n" not in str(error.value)
    assert scaler.get_scale() == 65536.0


@pytest.mark.parametrize(
    ("options", "why"), [(None, "nothing is scaled"), (LossScaling.static(8.0), r"is static \(8\)")], ids=str
)
def test_a_scale_that_nothing_searches_for_cannot_be_moved(options: LossScaling | None, why: str) -> None:
    with pytest.raises(ScalingError, match=why) as error:
        LossScaler(options).move_to(4.0)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_moving_the_scale_on_cuda_waits_for_nothing() -> None:
    scaler = LossScaler(LossScaling())
    optimizer = sgd(param := torch.nn.Parameter(torch.zeros(3, device="cuda")))
    scaler.scale(torch.zeros((), device="cuda"))
    param.grad = torch.full_like(param, 65536.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.move_to(1024.0, [optimizer])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert param.grad.tolist() == [1024.0] * 3
    assert scaler.state_dict() == {"scale": 1024.0, "growth_tracker": 0, "overflows": 0}
