"""The formats that a device computes in with arithmetic of its own.

>>> native_support("fp32", "cpu").native, native_support("fp8", "cpu").native
(True, False)
"""

from lightning_mixprec.numerics.devices.named import DEVICES, NamedDevice, named_device
from lightning_mixprec.numerics.devices.native import native_support
from lightning_mixprec.numerics.devices.support import Support

__all__ = ["DEVICES", "NamedDevice", "Support", "named_device", "native_support"]
