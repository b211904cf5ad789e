"""What is said of a device and a format: the one form of every rule's answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """The support of a device for a format: arithmetic of its own or none, and the reason.

    Attributes:
        native: Whether the device computes in the format itself, without emulation.
        reason: A clause that names what was asked and what was found.
    """

    native: bool
    reason: str
