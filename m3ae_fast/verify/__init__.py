"""Golden files of the official implementation, replayed on this one."""

from m3ae_fast.verify.program import main, quantities
from m3ae_fast.verify.quantity import Quantity, relative_error

__all__ = ["Quantity", "main", "quantities", "relative_error"]
