"""Validation: a patched kernel on a ROM does what the native one does, site by site and boot by boot.

May import patch, rombuild, emu and what is below them.
"""

from vmipatch.validate.validation import Request, Validation, validate

__all__ = ["Request", "Validation", "validate"]
