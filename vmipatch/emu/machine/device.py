"""The base of every device: how its state is saved and brought back.

Imports nothing of the package.
"""

from __future__ import annotations

from typing import Any, ClassVar

MUTABLE = (list, bytearray, dict)


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

    def save(self) -> Any:
        """The device's state; a copy that nobody changes."""
        mine = self.__dict__
        kept = {name: mine[name] for name in self.FIELDS}
        changing = [name for name, value in kept.items() if type(value) in MUTABLE]
        for name in changing:
            kept[name] = kept[name].copy()
        return kept, changing

    def restore(self, state: Any) -> None:
        """Bring back what :meth:`save` returned."""
        kept, changing = state
        mine = self.__dict__
        mine.update(kept)
        for name in changing:
            mine[name] = kept[name].copy()
