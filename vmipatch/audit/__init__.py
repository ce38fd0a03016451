"""Audits of kernel images: what is sensitive and unannotated, which sites are unsafe, which ROM does not fit.

Imports patch, rombuild, annotate, image, isa, facts and errors.
"""

from vmipatch.audit.engine import audit
from vmipatch.audit.finding import KINDS, SEVERITIES, Audit, Finding, FunctionCount, Kind, Swept, reaches

__all__ = ["KINDS", "SEVERITIES", "Audit", "Finding", "FunctionCount", "Kind", "Swept", "audit", "reaches"]
