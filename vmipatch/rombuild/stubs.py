"""From a hypervisor's entry for a call to the assembly of its stub.  Imports the specs and the assembler.

A deprivileged hypervisor's stub begins with a test of the RPL of CS: 0 means that VMI_Init has not been, and
the ABI's native code runs.  The test keeps every register; arithmetic flags are free in every contract.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vmipatch.errors import AssemblyError, SpecError, UsageError
from vmipatch.isa.assemble import Assembly, assemble
from vmipatch.rombuild.abi import Abi, Call
from vmipatch.rombuild.hypervisor import WORDS, Hypervisor, Text

_TOKEN = re.compile(r"\{([A-Za-z_]\w*)(?:\+(\d+))?\}")
_LABEL = re.compile(r"(?m)(?:^|;)\s*([A-Za-z_]\w*):")
_BASE = re.compile(r"\.rombase (e[a-d]x|e[sd]i|ebp)")
_LAST = re.compile(r"(?:^|[;\n:])\s*([a-z]\w*)[^;\n:]*\s*$")
_TEST = "push eax; mov eax, cs; test al, 3; pop eax; jne paravirt; "
_MAX_EXPANDED = 10000  # macros in one ROM: ours have a hundred
BASE_MARK = 0x7FFFFFF0  # stands for the offset of the POP in front of it, until the stub has its place
_ENDS = frozenset(["ret", "jmp", "iretd", "sysexit", "ud2"])


@dataclass(frozen=True)
class Stub:
    """One piece of ROM code: a call's stub, a routine or an entry, assembled but not yet placed.

    ``call`` is None for what is no call. ``answer`` is the name of its relocation type.
    """

    name: str
    call: Call | None
    answer: str
    assembly: Assembly
    file: str
    line: int


@dataclass
class Writer:
    """Makes the stubs of one ROM; ``macros`` are expanded and numbers filled in from the hypervisor's spec."""

    abi: Abi
    hypervisor: Hypervisor
    _values: dict[str, int] = field(default_factory=dict)
    _native: dict[str, str] = field(default_factory=dict)
    _expanded: int = 0

    def __post_init__(self) -> None:
        """Collect the numbers that ``{name}`` may stand for."""
        hv = self.hypervisor
        self._values.update(hv.constants)
        self._values.update({key: hv.virtual_top + place.offset for key, place in hv.state.items()})
        iret = self.abi.calls.get("IRET")
        self._values["iret_number"] = iret.number if iret else 0
        if hv.detect:
            signature = str(hv.detect.get("signature", "")).encode("latin-1", "replace")
            if len(signature) != 12 or not isinstance(hv.detect.get("leaf"), int):
                raise SpecError("detect needs a leaf and a signature of 12 bytes", file=hv.file)
            self._values["detect_leaf"] = hv.detect["leaf"]
            for number, register in enumerate(("ebx", "ecx", "edx")):
                word = signature[4 * number : 4 * number + 4]
                self._values[f"detect_{register}"] = int.from_bytes(word, "little")

    def stub(self, call: Call) -> Stub | None:
        """The stub of a call; None where the answer is NONE and nothing is to be written."""
        hv, abi = self.hypervisor, self.abi
        entry = hv.entry(abi, call.name)
        explicit = entry is not None
        if entry is None:
            entry = Text(hv.default, hv.file, 1)
        word = entry.text.strip() if entry.text.strip() in WORDS else ""
        if word == "none" and abi.slot_size is not None:
            word = "native"
        answer = {"none": "NONE", "nop": "NOP"}.get(word, "JUMP_REL" if call.jump else "CALL_REL")
        if abi.slot_size is not None:
            answer = "CALL_REL"
        if answer not in call.relocations:
            if explicit and word != "nop":
                raise SpecError(
                    f"{abi.name} allows {' or '.join(call.relocations)} for it, not {answer}",
                    file=entry.file,
                    section=call.name,
                    line=entry.line,
                )
            # Not spoken by this ABI: a default gives way, and so does a NOP.
            answer = "NONE" if word != "nop" else "CALL_REL"
        if answer in ("NONE", "NOP"):
            return Stub(call.name, call, answer, Assembly(b"", (), {}, ()), entry.file, entry.line)
        if word == "nop":
            text = "ret" if not (call.jump or call.noreturn) else self.native(call)
            return self.assembled(call.name, call, answer, self._dropped(call) + text, entry.file, entry.line)
        native = self.native(call)
        if word == "native":
            # Its text is the ABI's, so are the lines of its errors.
            return self.assembled(call.name, call, answer, self._dropped(call) + native, call.file, call.line)
        if word == "gate":
            leave = call.jump or call.noreturn
            body = f"push {call.number}; jmp {'leave' if leave else 'gate'}"
        else:
            body = self._closed(call, self.expand(entry, call.name))
        head = self._dropped(call) + _TEST + self._one_line(native) + "; paravirt: "
        return self.assembled(call.name, call, answer, head + body.lstrip("\n"), entry.file, entry.line)

    def routine(self, name: str) -> Stub | None:
        """A routine of the spec by name, None if there is none."""
        text = self.hypervisor.routines.get(name)
        if text is None:
            return None
        return self.assembled(name, None, "", self.expand(text, name), text.file, text.line)

    def init(self) -> Stub:
        """VMI_Init."""
        text = self.hypervisor.init
        return self.assembled("VMI_Init", None, "", self.expand(text, "VMI_Init"), text.file, text.line)

    def get_relocation(self, table: int, count: int) -> Stub:
        """GetRelocationInfo over the table at ``table`` (offset in the ROM): EAX = number -> EDX:EAX."""
        text = f"""
            .rombase ecx
            xor edx, edx
            cmp eax, {count}
            jae none
            movzx edx, byte ptr [ecx + eax*8 + {table + 4}]
            test edx, edx
            je none
            mov eax, dword ptr [ecx + eax*8 + {table}]
            add eax, ecx
            ret
        none: xor eax, eax
            ret"""
        return self.assembled("GetRelocationInfo", None, "", text, "(builder)", 1)

    def native(self, call: Call) -> str:
        """The ABI's native code for a call, checked once, ending as the contract says."""
        if call.name not in self._native:
            text = self._closed(call, call.asm) if call.asm is not None else "ret"
            if call.asm is not None and not self._native_ok(call):
                raise SpecError("does not assemble to the bytes it gives", file=call.file, section=call.name)
            self._native[call.name] = text
        return self._native[call.name]

    def expand(self, text: Text, section: str, source: str | None = None, depth: int = 0) -> str:
        """Put numbers and macros in the place of ``{name}`` and ``{name+4}``."""

        def value(match: re.Match[str]) -> str:
            name, plus = match[1], int(match[2] or 0)
            if name == "number" and section in self.abi.calls:
                return str(self.abi.calls[section].number)
            if name in self._values:
                return f"{self._values[name] + plus:#x}"
            self._expanded += 1
            if name in self.hypervisor.macros and depth < 4 and self._expanded < _MAX_EXPANDED:
                return self.expand(text, section, self.hypervisor.macros[name], depth + 1)
            line = text.line + (source or text.text).count("\n", 0, match.start())
            lacking = "" if text.file == self.hypervisor.file else f" in {self.hypervisor.file}"
            raise SpecError(f"nothing is named {name!r}{lacking}", file=text.file, section=section, line=line)

        return _TOKEN.sub(value, text.text if source is None else source)

    def assembled(self, name: str, call: Call | None, answer: str, text: str, file: str, line: int) -> Stub:
        """A piece of code from its text; ``.rombase REG`` puts the linear address of the ROM into a register."""

        def base(match: re.Match[str]) -> str:
            return f"call base_{match.start()}; base_{match.start()}: pop {match[1]}; sub {match[1]}, {BASE_MARK}"

        assembly = assemble(_BASE.sub(base, text), file=file, section=name, line=line)
        if not assembly.code:
            raise AssemblyError("no code", file=file, section=name, line=line)
        return Stub(name, call, answer, assembly, file, line)

    def _native_ok(self, call: Call) -> bool:
        assert call.asm is not None
        code = assemble(call.asm, file=call.file, section=call.name, line=call.line).code
        return not call.native or code.startswith(call.native)

    def _dropped(self, call: Call) -> str:
        # A slot is called, so what is meant to be jumped to finds a return address on top of its frame.
        return "lea esp, [esp + 4]; " if call.jump and self.abi.slot_size is not None else ""

    def _closed(self, call: Call, text: str) -> str:
        found = _LAST.search(text.rstrip())
        if call.jump or call.noreturn or (found and found[1] in _ENDS):
            return text
        return text.rstrip() + "; ret"

    def _one_line(self, native: str) -> str:
        """The native code on one line, its labels out of the way of the stub's own."""
        for label in _LABEL.findall(native):
            native = re.sub(rf"\b{label}\b", f"native_{label}", native)
        return "; ".join(part.strip() for part in native.split("\n") if part.strip())


def write_all(abi: Abi, hypervisor: Hypervisor) -> tuple[Writer, list[Stub]]:
    """A writer and the stubs of all calls of the ABI, but for Init and GetRelocationInfo.

    Raises :class:`UsageError` for a pair that is not supported.
    """
    reason = hypervisor.supports(abi)
    if reason:
        raise UsageError(f"no {abi.name} ROM for {hypervisor.name}: {reason}")
    writer = Writer(abi, hypervisor)
    stubs = [writer.stub(c) for c in abi.calls.values() if not (c.init or c.get_relocation)]
    return writer, [s for s in stubs if s is not None]
