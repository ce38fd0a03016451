"""Does the built code keep the ABI's contracts?  Read from the decoded instructions of the linked image.

Every path through a stub is followed, routines included, with what each register and stack slot holds told as
"the value that X had at entry" or "something else".  At the end of a path the stack must be level, the return
address be the caller's, and every register outside the contract hold what it held at entry.  What a trap into
the hypervisor changes is the hypervisor's convention: EAX.  Imports capstone when used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vmipatch.errors import RomError, SpecError
from vmipatch.rombuild.abi import REGISTERS, Abi, Call
from vmipatch.rombuild.stubs import Stub

_MAX_STATES = 5000  # paths times instructions of one stub: ours take a few hundred
_PARENT = {
    **{r: r for r in REGISTERS},
    **{r[1:]: r for r in REGISTERS},
    **{f"{letter}{half}": f"e{letter}x" for letter in "acdb" for half in "lh"},
}
_SEGMENTS = frozenset(["cs", "ds", "es", "fs", "gs", "ss"])
_TRAPS = frozenset(["int", "vmcall", "vmmcall"])
XEN_EMULATE = bytes.fromhex("0f0b78656e")  # before CPUID, asm/xen/interface.h
RETURN = "the return address"


def answers(abi: Abi, stubs: list[Stub]) -> None:
    """Raise :class:`SpecError` unless every call that a guest of this ABI needs is answered as it needs it."""
    by_name = {stub.name: stub for stub in stubs}
    for name, kinds in abi.needs.items():
        for call in abi.calls.values():
            if name not in ("*", call.name) or call.init or call.get_relocation:
                continue
            stub = by_name.get(call.name)
            answer = stub.answer if stub else "NONE"
            if answer not in kinds:
                where = {"file": stub.file, "line": stub.line} if stub else {}
                raise SpecError(
                    f"a guest of {abi.name} needs {' or '.join(kinds)} for it, not {answer}",
                    section=call.name,
                    **where,  # type: ignore[arg-type]
                )
    for rule in abi.together:
        first = by_name.get(rule["when"])
        if first is None or first.answer == "NONE":
            continue
        for name in rule["then"]:
            stub = by_name.get(name)
            if stub is None or stub.answer != "CALL_REL":
                raise SpecError(
                    f"{rule['when']} is answered, so a guest of {abi.name} calls this: it needs CALL_REL",
                    file=stub.file if stub else None,
                    section=name,
                    line=stub.line if stub else None,
                )


def check(abi: Abi, image: bytes, pieces: list[Stub], placed: Mapping[str, int]) -> None:
    """Raise :class:`RomError`, naming file, call and line, for a stub that breaks its contract.

    ``pieces`` are all stubs and routines of the image, ``placed`` their offsets by name.
    """
    code = _Code(image, pieces, placed)
    for stub in pieces:
        if stub.assembly.code and stub.call is not None:
            _Walk(code, abi, stub.call, stub, placed[stub.name]).run()


@dataclass(frozen=True)
class _Decoded:
    """What the walk needs of one instruction."""

    size: int
    mnemonic: str
    text: str
    operands: tuple[tuple[str, Any], ...]  # ("reg", name), ("imm", n), ("mem", (base, index, disp, size))
    writes: frozenset[str]
    memory_write: bool


class _Code:
    """The image, decoded on demand, and where each piece of it was written."""

    def __init__(self, image: bytes, pieces: list[Stub], placed: Mapping[str, int]) -> None:
        self.image = image
        self.pieces = [(placed[piece.name], piece) for piece in pieces if piece.assembly.code]
        self.cache: dict[int, _Decoded | None] = {}

    def source(self, offset: int) -> tuple[Stub, int] | None:
        """The piece that holds an offset, and the line of its file."""
        for start, piece in self.pieces:
            for item in piece.assembly.items:
                if start + item.offset <= offset < start + item.offset + len(item.code):
                    return piece, item.line
        return None

    def at(self, offset: int) -> _Decoded | None:
        if offset not in self.cache:
            inside = 0 <= offset < len(self.image)
            self.cache[offset] = _decode(self.image[offset : offset + 15]) if inside else None
        return self.cache[offset]


@cache
def _detailed() -> Any:
    import capstone

    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    engine.detail = True
    return engine


@cache
def _decode(code: bytes) -> _Decoded | None:
    import capstone
    from capstone import x86

    if code.startswith(XEN_EMULATE):
        # Not the UD2 that it begins with: Xen steps over it and emulates what follows (xen/arch/x86/traps.c).
        return _Decoded(len(XEN_EMULATE), "nop", "xen emulate prefix", (), frozenset(), False)
    found = next(_detailed().disasm(code, 0, 1), None)
    if found is None:
        return None
    operands: list[tuple[str, Any]] = []
    memory_write = False
    for op in found.operands:
        if op.type == x86.X86_OP_REG:
            operands.append(("reg", found.reg_name(op.reg)))
        elif op.type == x86.X86_OP_IMM:
            operands.append(("imm", op.imm))
        else:
            base = found.reg_name(op.mem.base) if op.mem.base else ""
            index = found.reg_name(op.mem.index) if op.mem.index else ""
            operands.append(("mem", (base, index, op.mem.disp, op.size)))
            memory_write |= bool(op.access & capstone.CS_AC_WRITE) or found.mnemonic.startswith("mov")
    _, written = found.regs_access()
    names = frozenset(found.reg_name(r) for r in written)
    return _Decoded(
        found.size, found.mnemonic, f"{found.mnemonic} {found.op_str}".strip(), tuple(operands), names, memory_write
    )


@dataclass(frozen=True)
class _State:
    """A point on a path; ``depth`` is ESP less its value at entry, values are names of what they were."""

    offset: int
    depth: int
    registers: tuple[str, ...]
    stack: frozenset[tuple[int, str]]


class _Walk:
    def __init__(self, code: _Code, abi: Abi, call: Call, stub: Stub, start: int) -> None:
        self.code, self.call, self.stub, self.start = code, call, stub, start
        self.in_slot = abi.slot_size is not None
        # What lies from here up is the caller's; a slot that drops its return address may use that word.
        self.callers = 4 if call.jump and self.in_slot else 0

    def fail(self, state: _State, message: str) -> RomError:
        piece, line = self.code.source(state.offset) or (self.stub, self.stub.line)
        name = self.call.name if piece.name == self.call.name else f"{self.call.name} ({piece.name})"
        return RomError(message, file=piece.file, section=name, line=line)

    def run(self) -> None:
        frame = 0 if self.call.jump and not self.in_slot else 4
        stack = {(0, RETURN)} if frame else set()
        stack |= {(frame + 4 * n, f"stack word {n}") for n in range(9)}
        todo = [_State(self.start, 0, REGISTERS, frozenset(stack))]
        seen: set[_State] = set()
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            if len(seen) > _MAX_STATES:
                raise self.fail(state, "too many paths to follow")
            todo += self.step(state)

    def step(self, state: _State) -> list[_State]:
        found = self.code.at(state.offset)
        if found is None:
            raise self.fail(
                state, f"runs into bytes that are no instruction, or out of the image, at {state.offset:#x}"
            )
        after = state.offset + found.size
        word, operands = found.mnemonic, found.operands
        registers, stack = dict(zip(REGISTERS, state.registers, strict=True)), dict(state.stack)
        depth = state.depth

        def following(offset: int) -> _State:
            kept = frozenset((at, value) for at, value in stack.items() if at >= depth)
            return _State(offset, depth, tuple(registers[r] for r in REGISTERS), kept)

        if word.startswith(("j", "loop")) or word == "call":
            if operands[0][0] != "imm":
                raise self.fail(state, f"{found.text!r}: a branch to where nobody can tell")
            target = operands[0][1] & 0xFFFFFFFF
            target = (target + state.offset) & 0xFFFFFFFF  # decoded as if at 0
            if word.startswith("loop"):
                registers["ecx"] = "?"
            if not 0 <= target < len(self.code.image):
                raise self.fail(state, f"{found.text!r} leaves the image")
            if word == "call":
                depth -= 4
                stack[depth] = f"@{after}"
                return [following(target)]
            return [following(target)] if word == "jmp" else [following(after), following(target)]
        if word == "ret":
            top = stack.get(depth, "?")
            if operands:
                raise self.fail(state, "the caller pops its arguments, not the stub")
            if top.startswith("@"):
                depth += 4
                return [following(int(top[1:]))]
            self.end(state, registers, depth, top)
            return []
        if word in ("iretd", "iret", "sysexit", "sysret"):
            self.leave(state, word, registers, depth, stack)
            return []
        if word == "ud2":
            if not (self.call.jump or self.call.noreturn):
                raise self.fail(state, "does not return to its caller")
            return []
        if word in _TRAPS or (word == "in" and operands and operands[0] == ("reg", "eax")):
            registers["eax"] = "?"
            return [following(after)]
        depth = self.effect(state, found, registers, stack, depth)
        return [following(after)]

    def effect(
        self, state: _State, found: _Decoded, registers: dict[str, str], stack: dict[int, str], depth: int
    ) -> int:
        """What a plain instruction does to registers and stack; returns the new depth."""
        word, operands = found.mnemonic, found.operands
        kinds = tuple(kind for kind, _ in operands)
        if found.memory_write and word not in ("push", "pop") and "esp" not in found.writes:
            self.store(state, found, registers, stack, depth)
        if word in ("pushal", "pushad"):
            values = [registers[r] for r in REGISTERS]
            values[4] = "?"
            for n, value in enumerate(values):
                stack[depth - 4 * (n + 1)] = value
            return depth - 32
        if word in ("popal", "popad"):
            for n, register in enumerate(reversed(REGISTERS)):
                if register != "esp":
                    registers[register] = stack.get(depth + 4 * n, "?")
            return depth + 32
        if word in ("push", "pushfd"):
            if operands and found.size and found.text.startswith("push") and self.narrow(found):
                raise self.fail(state, f"{found.text!r} leaves the stack unaligned")
            stack[depth - 4] = self.value(operands[0], registers, stack, depth) if operands else "?"
            return depth - 4
        if word in ("pop", "popfd"):
            value = stack.get(depth, "?")
            if value == RETURN:
                raise self.fail(state, f"{found.text!r} takes the return address")
            if kinds == ("reg",):
                register = operands[0][1]
                if register in _SEGMENTS:
                    raise self.fail(state, f"{found.text!r} changes a segment register")
                registers[_PARENT[register]] = value if register in registers else "?"
            return depth + 4
        if "esp" in found.writes:
            return self.moved(state, found, depth)
        if word == "mov" and len(operands) == 2 and kinds[0] == "reg" and operands[0][1] in registers:
            registers[operands[0][1]] = self.value(operands[1], registers, stack, depth)
            return depth
        if word == "xchg" and kinds == ("reg", "reg") and operands[0][1] in registers and operands[1][1] in registers:
            a, b = operands[0][1], operands[1][1]
            registers[a], registers[b] = registers[b], registers[a]
            return depth
        for name in found.writes:
            if name in _SEGMENTS:
                raise self.fail(state, f"{found.text!r} changes a segment register")
            if name in _PARENT:
                registers[_PARENT[name]] = "?"
        if word == "std":
            raise self.fail(state, "'std' changes the direction flag")
        return depth

    @staticmethod
    def narrow(found: _Decoded) -> bool:
        kind, value = found.operands[0]
        return (kind == "reg" and value in _PARENT and not value.startswith("e")) or (kind == "mem" and value[3] == 2)

    def moved(self, state: _State, found: _Decoded, depth: int) -> int:
        """ESP changed by something other than push and pop: only by a constant."""
        word, operands = found.mnemonic, found.operands
        if word == "lea" and operands[1][0] == "mem":
            base, index, displacement, _ = operands[1][1]
            if base == "esp" and not index:
                return depth + int(displacement)
        if word in ("add", "sub") and operands[0] == ("reg", "esp") and operands[1][0] == "imm":
            amount = int(operands[1][1])
            amount = amount - (1 << 32) if amount >= 1 << 31 else amount
            return depth + (amount if word == "add" else -amount)
        raise self.fail(state, f"{found.text!r}: nobody can tell where the stack is")

    def value(self, operand: tuple[str, Any], registers: dict[str, str], stack: dict[int, str], depth: int) -> str:
        kind, value = operand
        if kind == "reg":
            return registers.get(value, "?")
        if kind == "mem" and value[0] == "esp" and not value[1] and value[3] == 4:
            return stack.get(depth + value[2], "?")
        return "?"

    def store(
        self, state: _State, found: _Decoded, registers: dict[str, str], stack: dict[int, str], depth: int
    ) -> None:
        """A write to memory through ESP; through other registers it is the call's business."""
        kind, value = found.operands[0]
        if kind != "mem" or value[0] != "esp" or found.mnemonic in ("cmp", "test", "bt"):
            return
        if value[1]:
            raise self.fail(state, f"{found.text!r}: nobody can tell which stack word that is")
        at = depth + value[2]
        if at >= self.callers:
            what = stack.get(at & ~3, "a stack word")
            raise self.fail(state, f"{found.text!r} writes {what}, which is the caller's")
        whole = found.mnemonic == "mov" and value[3] == 4 and at % 4 == 0
        stack[at & ~3] = self.value(found.operands[1], registers, stack, depth) if whole else "?"

    def end(self, state: _State, registers: dict[str, str], depth: int, top: str) -> None:
        """A return to the caller."""
        if self.call.jump:
            raise self.fail(state, "'ret': it is jumped to, there is nobody to return to")
        if depth != 0 or top != RETURN:
            raise self.fail(state, f"the stack is not level at the end: ESP is {depth:+d} from where it was")
        changed = [r for r in REGISTERS if registers[r] != r and r not in self.call.may_change and r != "esp"]
        if changed:
            kept = "an interrupt call keeps every register" if self.call.keep_all else "the contract keeps it"
            raise self.fail(state, f"{', '.join(changed)} changed, but {kept}")

    def leave(self, state: _State, word: str, registers: dict[str, str], depth: int, stack: dict[int, str]) -> None:
        """IRET or SYSEXIT itself: only at the end of a call that is jumped to."""
        if not self.call.jump:
            raise self.fail(state, f"{word!r} in a call that returns")
        changed = [r for r in REGISTERS if r != "esp" and registers[r] != r]
        if changed:
            raise self.fail(state, f"{', '.join(changed)} changed on the way out")
        if word in ("iretd", "iret"):
            frame = 4 if self.in_slot else 0
            made = stack.get(depth) == "edx" and stack.get(depth + 12) == "ecx"
            if not (made if "edx" in self.call.args else depth == frame):
                raise self.fail(state, f"the stack is not level at the end: the frame is {frame - depth} bytes away")
