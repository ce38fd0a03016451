"""What the builder refuses: every rule broken by a spec, the error naming file, call and line."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from romguest import rom

from vmipatch import facts
from vmipatch.errors import SpecError, UsageError, VmipatchError
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild.build import build, build_many

HEAD = 'name = "mine"\ninherits = "deprivileged"\ntitle = "mine"\n'
HEAD += '[detect]\nleaf = 0x40000000\nsignature = "minemineMINE"\n'
TRAP = '[macros]\ntrap = "mov ebx, esp; mov eax, 1; int 0x99"\n'


def spec(tmp_path: Path, body: str, head: str = HEAD + TRAP) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(head + body)
    return os.fspath(path)


def refused(tmp_path: Path, body: str, abi: str = "vmi-3.0", head: str = HEAD + TRAP) -> VmipatchError:
    with pytest.raises(VmipatchError) as caught:
        build(spec(tmp_path, body, head), abi)
    assert str(tmp_path / "mine.toml") in str(caught.value)
    return caught.value


def line_of(tmp_path: Path, text: str) -> int:
    lines = (tmp_path / "mine.toml").read_text().split("\n")
    return next(n for n, line in enumerate(lines, 1) if text in line)


def test_a_sound_spec_of_ones_own(tmp_path: Path) -> None:
    made = build(spec(tmp_path, '[calls]\nSetTR = "mov dword ptr [{tr}], eax"\n'))
    assert made.hypervisor == "mine"


STUBS = [
    # (call, stub, ABI, what the error says, the line's text)
    ("CLTS", "mov ebx, 1", "vmi-3.0", "ebx changed", None),
    ("CLTS", "push eax", "vmi-3.0", "not level", None),
    ("CLTS", "push dword ptr [esp]", "vmi-3.0", "not level", None),
    ("CLTS", "test eax, eax; jne end; mov ebx, 1; end: ret", "vmi-3.0", "ebx changed", None),
    ("CLTS", "test eax, eax; je bad; ret; bad: mov ebx, 1", "vmi-3.0", "ebx changed", None),
    ("CLTS", "pop eax; push eax", "vmi-3.0", "return address", "pop eax"),
    ("CLTS", "lea esp, [esp + 4]; ret", "vmi-3.0", "not level", None),
    ("CLTS", "push ebx; mov ebx, 1; test eax, eax; je out; pop ebx; out: ret", "vmi-3.0", "level", None),
    ("CLTS", "push esi; mov esi, 1; mov dword ptr [esp], esi; pop esi", "vmi-3.0", "esi changed", None),
    ("CLTS", "mov dword ptr [esp], eax", "vmi-3.0", "caller's", "mov dword"),
    ("CLTS", "mov esp, eax", "vmi-3.0", "where the stack is", "mov esp"),
    ("CLTS", "jmp eax", "vmi-3.0", "nobody can tell", "jmp eax"),
    ("CLTS", "ret 4", "vmi-3.0", "pops its arguments", "ret 4"),
    ("CLTS", "iretd", "vmi-3.0", "returns", "iretd"),
    ("CLTS", "ud2", "vmi-3.0", "does not return", "ud2"),
    ("CLTS", "std", "vmi-3.0", "direction", "std"),
    ("CLTS", "mov ds, eax", "vmi-3.0", "segment register", "mov ds"),
    ("CLTS", "push bx; pop bx", "vmi-3.0", "unaligned", "push bx"),
    ("CLTS", "and al, 1; cpuid", "vmi-3.0", "ebx changed", None),
    ("CLTS", "call gone", "vmi-3.0", "gone", "call gone"),
    ("CLTS", "mov eax, {nowhere}", "vmi-3.0", "nowhere", "nowhere"),
    ("CLTS", "mov eax, [", "vmi-3.0", "bracket", "mov eax, ["),
    ("CLTS", "frob", "vmi-3.0", "assemble", "frob"),
    ("CLTS", '.incbin \\"/etc/passwd\\"', "vmi-3.0", ".incbin", "incbin"),
    ("CLTS", ".section .data", "vmi-3.0", ".section", "section"),
    ("CLTS", ".byte 0x0f, 0x04", "vmi-3.0", "no instruction", None),
    ("EnableInterrupts", "mov eax, 1", "vmi-3.0", "an interrupt call keeps every register", None),
    ("DisableInterrupts", "mov ecx, 1", "vmi-13.0", "an interrupt call keeps every register", None),
    ("GetInterruptMask", "mov edx, 1; mov eax, 1", "vmi-3.0", "edx changed", None),
    ("SetInterruptMask", "xor eax, eax", "vmi-13.0", "eax changed", None),
    ("IRET", "push eax; mov eax, 1; iretd", "vmi-3.0", "eax changed", None),
    ("IRET", "lea esp, [esp + 4]; iretd", "vmi-3.0", "not level", None),
    ("IRET", "lea esp, [esp + 4]; iretd", "vmi-13.0", "not level", None),
    ("IRET", "ret", "vmi-3.0", "nobody to return to", "ret"),
    ("SYSEXIT", "mov edx, 1; sysexit", "vmi-3.0", "edx changed", "sysexit"),
    ("IRET", "none", "vmi-3.0", "JUMP_REL", "none"),
    ("SYSEXIT", "none", "vmi-3.0", "JUMP_REL", "none"),
    ("GetCycleCounter", "none", "vmi-3.0", "CALL_REL", "none"),
    ("SetAlarm", "none", "vmi-3.0", "CALL_REL", "none"),
    ("GetCR0", "nop", "vmi-3.0", None, None),
]


@pytest.mark.parametrize(("call", "stub", "abi", "says", "at"), STUBS)
def test_a_stub_that_breaks_its_contract(
    tmp_path: Path, call: str, stub: str, abi: str, says: str | None, at: str | None
) -> None:
    one_line = f'[calls]\nCPUID = "native"\n{call} = "{stub}"\n'
    if says is None:
        build(spec(tmp_path, one_line), abi)
        return
    error = refused(tmp_path, one_line, abi)
    assert says in str(error)
    assert call in (error.section or "")
    assert error.line == line_of(tmp_path, f"{call} =")
    if at is not None and ";" not in stub:
        # The same on several lines: the error counts them.
        several = f'[calls]\n{call} = """\n    nop\n    {stub}\n"""\n'
        if stub not in ("none", "nop"):
            error = refused(tmp_path, several, abi)
            assert error.line == line_of(tmp_path, at)


def test_routines_are_followed(tmp_path: Path) -> None:
    body = '[calls]\nCLTS = "call bad"\n[routines]\nbad = """\n    mov edi, 1\n    ret"""\n'
    error = refused(tmp_path, body)
    assert "edi changed" in str(error)


def test_a_routine_that_jumps_out_of_the_stack(tmp_path: Path) -> None:
    error = refused(tmp_path, '[calls]\nCLTS = "call bad"\n[routines]\nbad = "push eax; ret"\n')
    assert "level" in str(error) or "return address" in str(error)


def test_macros_that_never_end(tmp_path: Path) -> None:
    for macro in ("{more}", "{more}; " * 300):
        error = refused(tmp_path, f'more = "{macro}"\n[calls]\nCLTS = "{{more}}"\n')
        assert "more" in str(error)


def test_unknown_call(tmp_path: Path) -> None:
    error = refused(tmp_path, '[calls]\nCPUID = "native"\nFrobnicate = "nop"\n')
    assert isinstance(error, SpecError)
    assert (error.section, error.line) == ("Frobnicate", line_of(tmp_path, "Frobnicate"))
    error = refused(tmp_path, '[abi."vmi-3.0".calls]\nInit = "nop"\n')
    assert error.section == "Init"
    error = refused(tmp_path, '[abi."vmi-9.9".calls]\nCLTS = "nop"\n')
    assert "vmi-9.9" in str(error)


def test_what_does_not_fit(tmp_path: Path) -> None:
    big = "nop; " * 4200
    text = f'[calls]\nCLTS = "{big}ret"\nWBINVD = "{big}ret"\nSetCR4 = "{big}ret"\nSetCR0 = "{big}ret"\n'
    error = refused(tmp_path, text, "vmi-13.0")
    assert "16384" in str(error)
    assert error.section in ("CLTS", "WBINVD", "SetCR4", "SetCR0")
    assert error.line is None or error.line == line_of(tmp_path, f"{error.section} =")
    huge = "".join(
        f'{c} = "{"nop; " * 12000}ret"\n' for c in ("CLTS", "WBINVD", "SetCR0", "SetCR2", "SetCR3", "SetCR4")
    )
    error = refused(tmp_path, f"[calls]\n{huge}", "vmi-3.0")
    assert "65536" in str(error)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("this is not TOML", "TOML"),
        ('inherits = "nothing"', "nothing"),
        ('name = "x"', "missing"),
        ('bogus = 1\n' + HEAD + TRAP, "bogus"),
        (HEAD, "trap"),
        (HEAD.replace("minemineMINE", "short") + TRAP, "12 bytes"),
        ('virtual_top = 5\n' + HEAD + TRAP, "page"),
        ('version = "banana"\n' + HEAD + TRAP, "malformed"),
        ('version = "300.0"\n' + HEAD + TRAP, "one byte"),
        ('default = "maybe"\n' + HEAD + TRAP, "maybe"),
        ('abstract = true\n' + HEAD + TRAP, "base for others"),
        ('license = "G\\u0001L"\n' + HEAD + TRAP, "printable"),
        ('calls = 5\n' + HEAD + TRAP, "table"),
        (HEAD + TRAP + "[state]\nmine = [4090, 8, \"x\"]\n", "outside its page"),
        (HEAD + TRAP + "[state]\nmine = [0xE02, 4, \"x\"]\n", "overlaps"),
        (HEAD + TRAP + "[state]\nmine = 7\n", "state: mine"),
        (HEAD + TRAP + "[calls]\nCLTS = 7\n", "not a text"),
        (HEAD + TRAP + '[routines]\nIRET = "ret"\n', "no call's name"),
        (HEAD + TRAP + '[routines]\nnothing = "ret"\n', "builder"),
        (HEAD + TRAP + '[constants]\nX = "1"\n', "32-bit"),
        ("only = 5\n" + HEAD + TRAP, "list of ABI names"),
    ],
)  # fmt: skip
def test_malformed_specs(tmp_path: Path, head: str, says: str | None) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(head)
    with pytest.raises(VmipatchError) as caught:
        build(os.fspath(path))
    assert str(path) in str(caught.value)
    if says:
        assert says in str(caught.value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 40), 1 << 40)
    | st.text(max_size=12)
    | st.sampled_from(["native", "gate"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["CLTS", "calls", "asm", "é"]), inner, max_size=2)
    ),
    max_leaves=6,
)


def toml(value: object) -> str:
    """A value as TOML writes it inline."""
    if value is None or isinstance(value, bool):
        return str(bool(value)).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True).replace("\\u007f", "?")
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(k)} = {toml(v)}' for k, v in value.items())} }}"
    return str(value)


KEYS = ["name", "title", "version", "license", "virtual_top", "default", "only", "inherits", "abstract"]
TABLES = ["identity", "detect", "state", "constants", "macros", "init", "routines", "calls", "abi"]
INNER = [
    "vendor",
    "device",
    "class",
    "product",
    "leaf",
    "signature",
    "vif",
    "trap",
    "asm",
    "CLTS",
    "IRET",
    "gate",
    "vmi-3.0",
]


@settings(max_examples=300, deadline=None)
@given(
    top=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    inner=st.dictionaries(st.tuples(st.sampled_from(TABLES), st.sampled_from(INNER)), VALUES, max_size=3),
    abi=st.sampled_from(["vmi-3.0", "vmi-13.0"]),
)
def test_any_spec_builds_or_is_refused(
    top: dict[str, object], inner: dict[tuple[str, str], object], abi: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = {"name": "mine", "inherits": "deprivileged", "title": "mine", **top}
    tables = {
        ("detect", "leaf"): 0x40000000,
        ("detect", "signature"): "minemineMINE",
        ("macros", "trap"): "int 0x99",
        **inner,
    }
    text = "".join(f"{key} = {toml(value)}\n" for key, value in keys.items())
    for table in TABLES:
        text += f"[{table}]\n" + "".join(f'"{k}" = {toml(v)}\n' for (t, k), v in tables.items() if t == table)
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text)
    with contextlib.suppress(VmipatchError):
        build(os.fspath(path), abi)


def test_no_such_spec(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lguest"):
        build("hyperv")
    with pytest.raises(UsageError, match="deprivileged"):
        build("deprivileged")
    with pytest.raises(SpecError):
        build(os.fspath(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(SpecError):
        build(os.fspath(tmp_path / "binary.toml"))


def test_two_calls_on_one_slot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new ABI is a new file: one with a number given twice is refused, with both names."""
    for kind in ("abi", "hypervisors"):
        (tmp_path / kind).mkdir()
        for name in facts.names(kind):
            text = (facts.root() / kind / f"{name}.toml").read_text("utf-8")
            (tmp_path / kind / f"{name}.toml").write_text(text)
    broken = (tmp_path / "abi" / "vmi-13.0.toml").read_text().replace("INVD = { n = 28,", "INVD = { n = 29,", 1)
    (tmp_path / "abi" / "vmi-13.9.toml").write_text(broken.replace('name = "vmi-13.0"', 'name = "vmi-13.9"'))
    clear(monkeypatch, tmp_path)
    with pytest.raises(SpecError) as caught:
        abis.load("vmi-13.9")
    monkeypatch.undo()
    clear(monkeypatch, None)
    assert "29" in str(caught.value)
    assert {caught.value.section} <= {"INVD", "WBINVD"}
    assert "vmi-13.9.toml" in str(caught.value.file)
    lines = broken.split("\n")
    assert caught.value.line is not None
    assert lines[caught.value.line - 1].startswith(f"{caught.value.section} = {{ n = 29")


def test_a_new_abi_is_a_new_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind in ("abi", "hypervisors"):
        (tmp_path / kind).mkdir()
        for name in facts.names(kind):
            text = (facts.root() / kind / f"{name}.toml").read_text("utf-8")
            (tmp_path / kind / f"{name}.toml").write_text(text)
    (tmp_path / "abi" / "vmi-14.0.toml").write_text(
        'name = "vmi-14.0"\ngeneration = 13\ntitle = "one more"\ninherits = "vmi-13.0"\n[version]\nmajor = 14\n'
        '[dispatch]\ncount = 86\n[calls]\nReadTemperature = { n = 85, out = "eax", asm = "mov eax, 42" }\n'
    )
    clear(monkeypatch, tmp_path)
    made = build("native", "vmi-14.0")
    monkeypatch.undo()
    clear(monkeypatch, None)
    assert made.data[0x0D] == 14
    assert made.data[85 * 32 : 85 * 32 + 6] == bytes.fromhex("b82a000000c3")


def clear(monkeypatch: pytest.MonkeyPatch, root: Path | None) -> None:
    if root is not None:
        monkeypatch.setattr(facts, "root", lambda: root)
    for cached in (facts.names, facts.load, abis.load, abis._merged):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("hypervisor", "abi"),
    [(h, a) for h in ("native", "vmware", "xen", "kvm", "lguest") for a in ("vmi-13.3", "vmi-13.0-l4ka")]
    + [(h, "vmi-6.1") for h in ("vmware", "xen", "kvm", "lguest")],
)
def test_a_pair_that_is_not_supported_says_why(hypervisor: str, abi: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(hypervisor, abi)
    assert f"no {abi} ROM for {hypervisor}" in str(caught.value)
    assert "l4ka" in str(caught.value)


def test_one_image_for_each_abi() -> None:
    with pytest.raises(VmipatchError, match="twice"):
        build_many("native", ["vmi-3.0", "vmi-3.0"])
    parts = build_many("l4ka", ["vmi-3.0", "vmi-13.0", "vmi-6.1"])
    assert [p.abi for p in parts] == ["vmi-3.0", "vmi-13.0", "vmi-6.1"]
    assert parts[-1].data == rom("l4ka", "vmi-6.1").data
