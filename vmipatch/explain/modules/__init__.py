"""The modules of a running kernel: found, placed and explained; and who owns the rest of what it can execute.

Imports image, annotate, patch, errors, facts and its sisters in ``explain/``.
"""

from vmipatch.explain.modules.explainer import explain as explain_modules
from vmipatch.explain.modules.files import beside
from vmipatch.explain.modules.legal import ModuleLegal, legal_modules
from vmipatch.explain.modules.result import Area, ModuleExplained, Modules, Note

__all__ = ["Area", "ModuleExplained", "ModuleLegal", "Modules", "Note", "beside", "explain_modules", "legal_modules"]
