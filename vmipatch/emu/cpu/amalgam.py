"""Makes one Cython module of the engine's parts, so that the C compiler sees all of it at once.

May import forms.  The parts are ordinary Python modules; what changes on the
way is only spelling: imports between parts fall away, constants become an enum
(a C constant, where a module variable would be a Python object), annotations of
functions and of the two classes become C declarations, and the handlers that
forms.py writes are put behind.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from vmipatch.emu.cpu.forms import engine
from vmipatch.emu.cpu.state import LENGTHS

HERE = Path(__file__).parent
PARTS = (
    "words", "memory", "state", "flags", "alu", "faults", "pause", "host", "paging", "access", "segments", "stack",
    "tasks", "interrupts", "operands", "inout", "flow", "transfer", "strings", "general", "system",
    "identity", "x87_state", "x87_memory", "x87_register", "x87", "decode", "blocks", "run", "api",
)  # fmt: skip
SCALARS = {"u8", "u16", "u32", "u64", "i64", "s8", "s16", "s32", "p8", "p32", "p64"}
CLASSES = {"Core", "Memory"}
PREFIX = "K_"
MARKS = {"inline", "calls_python", "exported"}
VECTORS = {"list[u32]": "u32", "list[i64]": "i64", "list[u64]": "u64"}


def module() -> str:
    """The text of ``_core.pyx``."""
    constants: dict[str, int] = {}
    imports: list[str] = []
    code: list[str] = []
    rename = _Rename(constants)
    for part in PARTS:
        source = (HERE / f"{part}.py").read_text(encoding="utf-8")
        code.append(f"\n# ---- {part}.py\n")
        for node in rename.visit(ast.parse(source)).body:
            if isinstance(node, ast.ImportFrom):
                if node.module and node.module.rpartition(".")[2] not in (*PARTS, "__future__"):
                    imports.append(ast.unparse(node))
            elif isinstance(node, ast.Import):
                imports.append(ast.unparse(node))
            elif isinstance(node, ast.FunctionDef):
                code.append(_function(node))
            elif isinstance(node, ast.ClassDef):
                code.append(_class(node))
            elif isinstance(node, ast.Assign) and not _is_declared(node, constants):
                code.append(ast.unparse(node) + "\n")
    made = engine()
    for text in made.sources.values():
        code.append(_function(rename.visit(ast.parse(text)).body[0]))
    code.append("\n")
    code += [f"HANDLERS[{number}] = {name}\n" for number, name in enumerate(made.names)]
    header = "# cython: language_level=3\n" + (HERE / "primitives.pxi").read_text(encoding="utf-8")
    small = [f"    {PREFIX}{name} = {value}" for name, value in constants.items() if abs(value) <= 0x7FFFFFFF]
    large = [
        f"cdef enum:\n    {PREFIX}{name} = {value}" for name, value in constants.items() if abs(value) > 0x7FFFFFFF
    ]
    enum = "\n".join(["cdef enum:", *small, *large, ""])
    table = (
        "cdef class Core\n"
        "ctypedef i64 (*Handler)(Core c, i64 p) noexcept nogil\n"
        f"cdef Handler HANDLERS[{len(made.names)}]\n"
        "cdef inline p8 record_bytes(Core c) noexcept nogil:\n    return <p8> c.code\n"
    )
    text = "\n".join([header, *dict.fromkeys(imports), enum, table, "".join(code)])
    text = re.sub(r"\bcast\(", "cython.cast(", text)
    return re.sub(r"\bCOMPILED\b", "cython.compiled", text)


class _Rename(ast.NodeTransformer):
    """Gives constants a prefix (Cython has keywords of its own, IF among them), and large literals a name.

    Cython makes a Python object of a literal that does not fit a C int.
    """

    def __init__(self, constants: dict[str, int]) -> None:
        self.constants = constants
        self.on_objects = True
        self.in_function = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Only functions that run without the interpreter lock get their literals as C constants."""
        outer = self.on_objects, self.in_function
        self.on_objects, self.in_function = not _runs_without_lock(node), True
        self.generic_visit(node)
        self.on_objects, self.in_function = outer
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Methods keep theirs."""
        for item in node.body:
            for inner in ast.walk(item):
                if isinstance(inner, ast.Name):
                    self.visit_Name(inner)
        return node

    def visit_Module(self, node: ast.Module) -> ast.Module:
        for item in node.body:
            if isinstance(item, ast.Assign):
                _constant(item, self.constants)
        self.generic_visit(node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, int) and node.value > 0x7FFFFFFF and not self.on_objects:
            name = f"HEX_{node.value:X}"
            self.constants[name] = node.value
            return ast.Name(PREFIX + name, ast.Load())
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """The bytes of the records: the same memory as their words, so one pointer to load instead of two."""
        self.generic_visit(node)
        if node.attr == "code8" and self.in_function:
            return ast.Call(ast.Name("record_bytes", ast.Load()), [node.value], [])
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id in self.constants:
            node.id = PREFIX + node.id
        return node


def _constant(node: ast.Assign, constants: dict[str, int]) -> None:
    """Note a module's constant, if its value is a whole number."""
    target = node.targets[0]
    if not isinstance(target, ast.Name) or target.id in SCALARS or target.id == "COMPILED":
        return
    try:
        value = eval(compile(ast.Expression(node.value), "constant", "eval"), {}, dict(constants))
    except Exception:
        return
    if isinstance(value, int) and not isinstance(value, bool) and -(1 << 62) <= value < 1 << 64:
        constants[target.id] = value


def _is_declared(node: ast.Assign, constants: dict[str, int]) -> bool:
    """Whether an assignment is a constant or a type, which are declared elsewhere."""
    target = node.targets[0]
    if not isinstance(target, ast.Name):
        return False
    return target.id in SCALARS or target.id in ("COMPILED", "F", "T") or target.id.removeprefix(PREFIX) in constants


def _types(node: ast.FunctionDef) -> tuple[list[str], str]:
    """The C types of a function's arguments (empty: no annotation) and of its result."""
    types = [ast.unparse(a.annotation) if a.annotation else "" for a in node.args.args]
    types = ["object" if t == "Any" else t for t in types]
    result = ast.unparse(node.returns) if node.returns else ""
    return types, {"None": "void"}.get(result, result if result in SCALARS else "object")


def _runs_without_lock(node: ast.FunctionDef) -> bool:
    """Whether a function deals in C values only."""
    marks = {ast.unparse(d) for d in node.decorator_list}
    types, kind = _types(node)
    if marks & {"exported", "calls_python"} or kind == "object" or kind.startswith("p"):
        return False
    return all(t in SCALARS | CLASSES for t in types)


def _function(node: ast.stmt) -> str:
    """A function as a C function, by its annotations and marks; plain Python if they are not C's."""
    assert isinstance(node, ast.FunctionDef)
    if node.name in MARKS or node.name == "cast":
        return ""
    marks = {ast.unparse(d) for d in node.decorator_list}
    without_lock = _runs_without_lock(node)
    node.decorator_list = []
    _strip(node)
    arguments = node.args.args
    types, kind = _types(node)
    if not all(t in SCALARS | CLASSES | {"object"} for t in types):
        return ast.unparse(node) + "\n"
    listed = ", ".join(f"{t} {a.arg}" for t, a in zip(types, arguments, strict=True))
    body = "\n".join("    " + line for item in node.body for line in ast.unparse(item).splitlines())
    if "exported" in marks:
        head = f"cpdef {'object' if kind == 'void' else kind} {node.name}({listed})"
    elif "calls_python" in marks:
        head = f"cdef {kind} {node.name}({listed}) noexcept with gil"
    elif not without_lock:
        head = f"cdef {kind} {node.name}({listed})" + ("" if kind == "object" else " noexcept")
    else:
        head = f"cdef {'inline ' if 'inline' in marks else ''}{kind} {node.name}({listed}) noexcept nogil"
    return f"{head}:\n{body}\n"


def _strip(node: ast.AST) -> None:
    """Drop docstrings, which cost time at import only."""
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]


def _class(node: ast.ClassDef) -> str:
    """Turn the annotations of a class into fields of a C structure."""
    fields = []
    for item in list(node.body):
        if isinstance(item, ast.AnnAssign):
            node.body.remove(item)
            name, kind = ast.unparse(item.target), ast.unparse(item.annotation)
            if kind in VECTORS:
                fields.append(f"    cdef public {VECTORS[kind]} {name}[{LENGTHS[name]}]")
            elif kind.startswith("p"):
                fields.append(f"    cdef {kind} {name}")
            else:
                fields.append(f"    cdef public {kind} {name}")
    _strip(node)
    head, _, body = ast.unparse(node).partition("\n")
    return f"cdef {head}\n" + "\n".join(fields) + "\n" + body + "\n"


def write(folder: Path) -> Path:
    """Write ``_core.pyx`` into a folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "_core.pyx"
    path.write_text(module(), encoding="utf-8")
    return path


DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "nonecheck": False,
}
