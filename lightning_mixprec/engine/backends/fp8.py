"""fp8: products of e4m3 operands, and of e5m2 gradients with them; on tensor cores from compute capability 8.9 on."""

from collections.abc import Sequence

from typing_extensions import override

from lightning_mixprec.engine.backends.narrow import Narrow


class Fp8(Narrow):
    """The backend of fp8."""

    def __init__(self, device: str, emulate: bool | str) -> None:
        super().__init__("fp8", device, emulate)

    @override
    def is_worthwhile(self, shape: Sequence[int], scaling: str) -> bool:
        """As measured on an H100 for torchao's two recipes (0.18, ``float8_linear_utils``), which filter layers by it.

        >>> fp8 = Fp8("cuda", "auto")
        >>> fp8.is_worthwhile((4096, 4096), "row"), fp8.is_worthwhile((1024, 4096), "tensor")
        (True, False)
        """
        out_features, in_features = shape
        if scaling == "tensor":
            return in_features > 4096 or out_features > 1024
        return out_features > 2048 and in_features > 1024 and not (out_features <= 4096 and in_features <= 2048)
