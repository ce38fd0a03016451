"""A kernel image whatever its container: ELF32, ELF64, bzImage, module or raw memory."""

from vmipatch.image.image import Image
from vmipatch.image.kaslr import Relocations
from vmipatch.image.model import Section, Segment
from vmipatch.image.opening import open_image
from vmipatch.image.symbols import Symbols

__all__ = ["Image", "Relocations", "Section", "Segment", "Symbols", "open_image"]
