"""int8: products of whole numbers, scaled by row; gradients are products in 16 bits unless a rule asks for 8."""

from lightning_mixprec.engine.backends.narrow import Narrow


class Int8(Narrow):
    """The backend of int8. Sizes below which it is slower than 16 bits nobody published."""

    def __init__(self, device: str, emulate: bool | str) -> None:
        super().__init__("int8", device, emulate)
