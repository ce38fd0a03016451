"""The modules of a running kernel: found, placed and explained; and who owns the rest of what it can execute.

Imports image, annotate, patch, errors, facts and its sisters in ``explain/``.
"""

from typing import TYPE_CHECKING

from vmipatch.lazily import attributes

if TYPE_CHECKING:
    from vmipatch.explain.modules.explainer import explain_modules
    from vmipatch.explain.modules.files import beside
    from vmipatch.explain.modules.legal import ModuleLegal, legal_modules
    from vmipatch.explain.modules.result import Area, ModuleExplained, Modules, Note

__all__ = ["Area", "ModuleExplained", "ModuleLegal", "Modules", "Note", "beside", "explain_modules", "legal_modules"]

# Most dumps are explained without modules.
__getattr__ = attributes(
    __name__,
    {
        "beside": "vmipatch.explain.modules.files",
        "explain_modules": "vmipatch.explain.modules.explainer",
        **dict.fromkeys(("ModuleLegal", "legal_modules"), "vmipatch.explain.modules.legal"),
        **dict.fromkeys(("Area", "ModuleExplained", "Modules", "Note"), "vmipatch.explain.modules.result"),
    },
)
