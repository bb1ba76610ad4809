"""The original's attempts after v2.3 (handbook §5): P7 and P8, as models and loss terms of their versions."""

from . import p7, p8

__all__ = ["p7", "p8"]
