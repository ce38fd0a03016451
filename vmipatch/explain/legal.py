"""The legal-patch set: for every site, every byte string that this kernel may ever hold there, and its cause.

What a hypervisor that guards kernel text needs before the kernel runs.  Boot's
passes are run over each group of sites that share bytes, for every choice of
the CPU features that the group depends on.  States without a bound are patterns,
each with its domain.  Imports annotate, patch and its sisters in ``explain/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vmipatch.annotate import Scan, Site, scan
from vmipatch.annotate.family import AT_RUN_TIME
from vmipatch.explain import tracing
from vmipatch.explain.engine import EVIDENCE, text_of
from vmipatch.explain.everyboot import EveryBoot, groups_of, span
from vmipatch.explain.late import LATE, State
from vmipatch.image import Image
from vmipatch.patch.evidence import rules_for
from vmipatch.patch.passes import Boot, callthunks
from vmipatch.patch.passes.retpolines import Retpolines
from vmipatch.patch.passes.returns import ITS, Returns
from vmipatch.patch.planner import refuse_findings
from vmipatch.patch.rules import Rules

DOMAINS = {
    "ftrace-call": "E8 to ftrace_caller or ftrace_regs_caller, or to a trampoline that ftrace copies from them into "
    "memory outside the image, or to a direct-call trampoline registered with ftrace",
    "ftrace-jump": "E9 to a direct-call trampoline registered with ftrace to be jumped to",
    "ftrace-callback": "E8 to the function of a registered ftrace_ops, or to ftrace_ops_list_func or "
    "ftrace_ops_assist_func",
    "static-call": "E8 (a tail call and a trampoline: E9) to any function that the kernel stores in the site's key",
    "runtime-const": "any value: that which the variable named by the table gets while the kernel starts",
    "its-thunk": "E9 or E8 to a thunk of its own for the register, in memory outside the image (INDIRECT_THUNK_ITS)",
}
"""Patterns: states whose target has no bound."""

ANYWHERE = (
    ("kprobe", "CC at the start of any instruction that a kprobe may be set on"),
    ("optimised kprobe", "E9 at such an instruction, to a detour outside the image; only its five bytes change"),
    (
        "breakpoint while patching",
        "CC at the first byte of any site, while the kernel replaces it (text_poke_bp, 3.12 on)",
    ),
)
"""What may stand outside the sites."""


@dataclass(frozen=True, slots=True)
class Legal:
    """``length`` bytes at virtual ``address``: their states, and names of :data:`DOMAINS` that they may match too."""

    address: int
    length: int
    families: tuple[str, ...]
    states: tuple[State, ...]
    patterns: tuple[str, ...]


def legal(image: Image, *, kernel: tuple[int, ...] | None = None) -> Iterator[Legal]:
    """The legal-patch set of ``.text``, boot's sites first; sites that share bytes are one entry.

    Addresses are virtual, as linked; each state says which of its fields KASLR moves.
    """
    text = text_of(image)
    evidence = scan(image, EVIDENCE)
    refuse_findings(image, evidence)
    yield from within(image, rules_for(image, evidence, kernel).rules, evidence, [(text.address, text.end)])


def within(image: Image, rules: Rules, evidence: Scan, spans: Sequence[tuple[int, int]]) -> Iterator[Legal]:
    """The legal-patch set of stretches of text, each from a virtual address to another, by the rules of an era.

    ``evidence`` has the sites of :data:`EVIDENCE`.
    """
    late = scan(image, AT_RUN_TIME)
    refuse_findings(image, late)
    more = [family for family in rules.boot if family not in EVIDENCE]
    others = scan(image, more)
    refuse_findings(image, others)
    boot = Boot(image, rules, rules.nop_tables(image.bits)[0])
    # The calls of __fentry__ in .call_sites are mcount's, and never counted; the returns of trampolines whose static
    # calls start as none are those calls'.
    late_owned = {s.address for s in late.sites}
    boots = [
        s
        for s in (*evidence.sites, *others.sites)
        if s.address not in late_owned or s.family not in (callthunks.FAMILY, Returns.family)
    ]
    sites = (*boots, *callthunks.paddings(boot))

    def inside(site: Site) -> bool:
        return any(low <= site.address and site.end <= high for low, high in spans)

    callbacks = {a: tracing.LENGTH for a in tracing.callbacks(image) if any(low <= a < high for low, high in spans)}
    groups = list(groups_of(filter(inside, sites)))
    its = image.symbols.lookup(ITS) is not None
    for group, states in zip(groups, EveryBoot(image, rules, sites).states(groups), strict=True):
        start, length = span(group)
        families = (group[0].family,) if len(group) == 1 else tuple(sorted({s.family for s in group}))
        patterns: tuple[str, ...] = ()
        if its and Retpolines.family in families:
            patterns += ("its-thunk",)
        if callbacks.pop(start, None) == length:
            patterns += ("ftrace-callback",)
        yield Legal(start, length, families, states, patterns)
    for address, length in callbacks.items():
        states = (State(image.read(address, length), "on disk"),)
        yield Legal(address, length, ("mcount",), states, ("ftrace-callback",))
    for site in late.sites:
        if inside(site):
            listed, patterns = LATE[site.family].states(site, boot)
            distinct = {State(image.read(site.address, site.length), "on disk").code: "on disk"}
            for state in listed:
                distinct.setdefault(state.code, state.cause)
            states = tuple(State(code, cause) for code, cause in distinct.items())
            yield Legal(site.address, site.length, (site.family,), states, patterns)


def matches(entry: Legal, code: bytes, slide: int = 0) -> str | None:
    """The cause under which ``code`` may stand at an entry, or None; patterns by their opcode and domain.

    ``slide`` is how far KASLR has moved the kernel, in bytes.
    """
    listed = [(state, moved(state, slide)) for state in entry.states if len(state.code) == len(code)]
    for state, bytes_there in listed:
        if _masked(bytes_there, state.free) == _masked(code, state.free):
            return state.cause
    if "its-thunk" in entry.patterns:
        target = range(len(code) - 4, len(code))
        for state, bytes_there in listed:
            free = (*state.free, *target)
            if _branches(bytes_there) and _masked(bytes_there, free) == _masked(code, free):
                return "its-thunk"
    for pattern in entry.patterns:
        if pattern == "static-call" and (code[:1] in (b"\xe8", b"\xe9") or _same_condition(entry, code)):
            return pattern
        if pattern == "runtime-const":
            return pattern
        if pattern == "ftrace-jump" and code[:1] == b"\xe9":
            return pattern
        if pattern in ("ftrace-call", "ftrace-callback") and code[:1] == b"\xe8":
            return pattern
    return None


def moved(state: State, slide: int) -> bytes:
    """A state's bytes where KASLR has moved the kernel by ``slide`` bytes."""
    if not state.moves:
        return state.code
    code = bytearray(state.code)
    for move in state.moves:
        at, width = move.offset, move.width
        value = int.from_bytes(code[at : at + width], "little") + (slide if move.plus else -slide)
        code[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(code)


def _branches(code: bytes) -> bool:
    """Whether a site ends in a direct branch of 32 bits."""
    return code[-5:-4] in (b"\xe8", b"\xe9") or (code[-6:-5] == b"\x0f" and code[-5:-4] >= b"\x80")


def _same_condition(entry: Legal, code: bytes) -> bool:
    """Whether a conditional tail call has kept its condition."""
    return code[:1] == b"\x0f" and any(s.code[:2] == code[:2] and len(s.code) == len(code) for s in entry.states)


def _masked(code: bytes, free: Sequence[int]) -> bytes:
    return bytes(0 if i in free else byte for i, byte in enumerate(code)) if free else code


def summary(entries: Iterable[Legal]) -> Counter[str]:
    """How many entries there are of each family."""
    return Counter(family for entry in entries for family in entry.families)


__all__ = ["ANYWHERE", "DOMAINS", "Legal", "State", "legal", "matches", "moved", "summary", "within"]
