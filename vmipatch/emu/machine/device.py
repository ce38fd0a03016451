"""The base of every device: how its state is saved and brought back.

Imports nothing of the package.
"""

from __future__ import annotations

from typing import Any, ClassVar


class Device:
    """A device of the machine.

    ``FIELDS`` names the attributes that make up its guest-visible state.  They
    hold integers, booleans, ``None``, bytes, tuples of such, or a flat list,
    bytearray or dict of them, which is copied both ways.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def reset(self) -> None:
        """The state after power-on or the reset line."""
        raise NotImplementedError

    def save(self) -> tuple[Any, ...]:
        """The device's state, an immutable-by-convention copy."""
        return tuple([_copy(getattr(self, name)) for name in self.FIELDS])

    def restore(self, state: Any) -> None:
        """Bring back what :meth:`save` returned."""
        for name, value in zip(self.FIELDS, state, strict=True):
            setattr(self, name, _copy(value))


def _copy(value: Any) -> Any:
    kind = type(value)
    if kind is list:
        return value[:]
    if kind is bytearray:
        return bytearray(value)
    if kind is dict:
        return dict(value)
    return value
