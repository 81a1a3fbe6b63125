"""The former place of `Guide`; `lmcot.guide` is its place now."""

from lmcot.guide import Guide, Refused

__all__ = ["Guide", "Refused"]
