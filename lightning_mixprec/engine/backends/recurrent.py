"""Recurrent layers, a step of time after another, made of products: torch's own have no kernels for 16 bits everywhere.

Each calls functions of torch, which are replaced where they are called. What autocast casts is cast: on the CPU the
operands of an LSTM whose sequences are equally long and not empty, elsewhere those of every layer; of the others the
products alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, get_autocast_dtype, is_autocast_enabled
from torch.nn import functional

State = tuple[Tensor, ...]
"""What a layer hands on from one step to the next, each of shape (batch, features): hidden, and cell if it has one."""

Cell = Callable[[Tensor, State, Sequence[Tensor | None]], State]
"""A step: of the input's part of the gates, the state, and the weights that the state meets."""


def _hidden_gates(state: State, weights: Sequence[Tensor | None]) -> Tensor:
    weight, bias = weights[0], weights[1]
    assert weight is not None
    return functional.linear(state[0], weight, bias)


def _lstm_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    into, forget, new, out = (gates + _hidden_gates(state, weights)).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + into.sigmoid() * new.tanh()
    hidden = out.sigmoid() * cell.tanh()
    projection = weights[2]
    return (hidden if projection is None else functional.linear(hidden, projection)), cell


def _gru_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    reset, update, new = gates.chunk(3, -1)
    of_reset, of_update, of_new = _hidden_gates(state, weights).chunk(3, -1)
    candidate = (new + (reset + of_reset).sigmoid() * of_new).tanh()
    return ((state[0] - candidate) * (update + of_update).sigmoid() + candidate,)


def _tanh_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    return ((gates + _hidden_gates(state, weights)).tanh(),)


def _relu_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    return ((gates + _hidden_gates(state, weights)).relu(),)


def recurrent(step: Cell) -> Callable[..., Any]:
    """``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``, for sequences of equal lengths and for packed ones."""

    def run(data: Tensor, second: Any, third: Any, *rest: Any) -> Any:
        is_packed = isinstance(third, Tensor) or (isinstance(second, Tensor) and not isinstance(rest[0], bool))
        if is_packed:
            params, has_biases, layers, dropout, train, bidirectional = rest
            initial, sizes, batch_first = third, second.tolist(), False
        else:
            initial, params, sizes = second, third, None
            has_biases, layers, dropout, train, bidirectional, batch_first = rest
        states: State = (initial,) if isinstance(initial, Tensor) else tuple(initial)
        weights = _weights_of(params, has_biases, layers * (2 if bidirectional else 1))
        is_cast_on_cpu = step is _lstm_step and not is_packed and weights[0][4] is None and data.numel() > 0
        if data.device.type != "cpu" or is_cast_on_cpu:
            data, states, weights = _as_autocast(data), tuple(map(_as_autocast, states)), _all_cast(weights)
        if sizes is None:
            steps = list((data.transpose(0, 1) if batch_first else data).unbind())
        else:
            steps = list(data.split(sizes))
        steps, final = _layers(step, steps, states, weights, 2 if bidirectional else 1, dropout if train else 0.0)
        output = torch.cat(steps) if is_packed else torch.stack(steps)
        # Laid out as torch's own: what draws random numbers for it, as dropout does, goes by the order in memory.
        return (output.transpose(0, 1) if batch_first and not is_packed else output, *final)

    return run


def cell(step: Cell) -> Callable[..., Any]:
    """``torch.lstm_cell`` and its like: one step of one layer."""

    def run(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        after = step(functional.linear(input, w_ih, b_ih), state, (w_hh, b_hh, None))
        return after[0] if isinstance(hx, Tensor) else after

    return run


lstm, gru, rnn_tanh, rnn_relu = map(recurrent, (_lstm_step, _gru_step, _tanh_step, _relu_step))
lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell = map(cell, (_lstm_step, _gru_step, _tanh_step, _relu_step))


def _weights_of(params: Sequence[Tensor], has_biases: bool, count: int) -> list[list[Tensor | None]]:
    """By layer and direction: of the input weight and bias, of the state weight and bias, and the projection."""
    each = len(params) // count
    found = []
    for start in range(0, len(params), each):
        own: list[Tensor | None] = list(params[start : start + each])
        biases = own[2:4] if has_biases else [None, None]
        projection = own[4 if has_biases else 2 :]
        found.append([own[0], biases[0], own[1], biases[1], *(projection or [None])])
    return found


def _as_autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    return tensor.to(get_autocast_dtype(device)) if is_autocast_enabled(device) else tensor


def _all_cast(weights: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
    return [[None if tensor is None else _as_autocast(tensor) for tensor in own] for own in weights]


def _layers(
    step: Cell,
    steps: list[Tensor],
    initial: State,
    weights: list[list[Tensor | None]],
    directions: int,
    dropout: float,
) -> tuple[list[Tensor], State]:
    """Runs layer after layer, each in one direction or in both."""
    finals = []
    for layer in range(len(weights) // directions):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            state = tuple(part[place] for part in initial)
            output, final = _one_direction(step, steps, state, weights[place], is_reversed=direction == 1)
            outputs.append(output)
            finals.append(final)
        steps = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)] if directions == 2 else outputs[0]
        if dropout and layer + 1 < len(weights) // directions:
            lengths = [len(part) for part in steps]
            steps = list(functional.dropout(torch.cat(steps), dropout).split(lengths))
    return steps, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _one_direction(
    step: Cell, steps: list[Tensor], initial: State, weights: list[Tensor | None], is_reversed: bool
) -> tuple[list[Tensor], State]:
    """Runs one layer over time. Steps grow shorter where sequences end; a reversed run begins with the last ones."""
    assert weights[0] is not None
    lengths = [len(part) for part in steps]
    gates = functional.linear(torch.cat(steps), weights[0], weights[1]).split(lengths)
    order: Iterable[int] = reversed(range(len(steps))) if is_reversed else range(len(steps))
    outputs: list[Any] = [None] * len(steps)
    state: State = tuple(part[:0] for part in initial) if is_reversed else initial
    ended: list[State] = []
    for place in order:
        length, has = lengths[place], len(state[0])
        if length < has:
            ended.append(tuple(part[length:] for part in state))
            state = tuple(part[:length] for part in state)
        elif length > has:
            begun = (part[has:length] for part in initial)
            state = tuple(torch.cat(parts) if has else parts[1] for parts in zip(state, begun, strict=True))
        state = step(gates[place], state, weights[2:])
        outputs[place] = state[0]
    final = [state, *reversed(ended)]
    return outputs, tuple(torch.cat(parts) for parts in zip(*final, strict=True)) if ended else state
