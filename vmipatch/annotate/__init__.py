"""Annotation tables of every format: one module a family, all giving the same :class:`Site`.

Imports image, isa, facts and errors.
"""

from vmipatch.annotate.family import FAMILIES
from vmipatch.annotate.scanner import scan
from vmipatch.annotate.site import Finding, Scan, Site, TableInfo

__all__ = ["FAMILIES", "Finding", "Scan", "Site", "TableInfo", "scan"]
