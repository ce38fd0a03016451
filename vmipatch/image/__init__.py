"""A kernel image whatever its container: ELF32, ELF64, bzImage, module or raw memory."""

from vmipatch.image.image import Image
from vmipatch.image.model import Section, Segment
from vmipatch.image.opening import open_image

__all__ = ["Image", "Section", "Segment", "open_image"]
