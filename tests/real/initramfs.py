"""A tiny initramfs made in code: a cpio archive whose /init prints one line, waits for a newline, powers off.

Before it prints, /init loads the kernel modules that the archive was given, in their order, and says which of them
the kernel refused. For QEMU and for the project's own emulator. Imports the standard library only.
The archive is in the "newc" format (kernel documentation, driver-api/early-userspace/buffer-format); system
call numbers are those of the i386 and x86-64 Linux ABIs; the reboot constants those of reboot(2).
"""

from __future__ import annotations

import stat
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

REACHED = "vmipatch: init reached"
REFUSED = "vmipatch: the kernel refused the module "

_LOAD_AT = 0x08048000  # below 2 GiB, so that 32-bit immediates serve both programs
_MAGIC1, _MAGIC2, _POWER_OFF = 0xFEE1DEAD, 672274793, 0x4321FEDC


def build(bits: int = 32, line: str = REACHED, modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """The archive, uncompressed; `bits` (32 or 64) chooses the machine code of /init.

    `modules` are names and contents (unpacked ELF files), which /init loads in this order.
    """
    init = init_program(bits, line, [name for name, _data in modules])
    return archive({"init": init} | {_path(name)[1:]: data for name, data in modules})


def archive(programs: dict[str, bytes]) -> bytes:
    """An archive of executable files by name, with /dev/console and an empty /proc; uncompressed."""
    rows = [
        _entry(1, "dev", stat.S_IFDIR | 0o755),
        _entry(2, "dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _entry(3, "proc", stat.S_IFDIR | 0o755),
    ]
    rows += [_entry(n, name, stat.S_IFREG | 0o755, data) for n, (name, data) in enumerate(programs.items(), 4)]
    return b"".join((*rows, _entry(0, "TRAILER!!!", 0)))


def write(
    folder: Path, bits: int = 32, line: str = REACHED, modules: Sequence[tuple[str, bytes]] = (), name: str = ""
) -> Path:
    """The archive as a file in `folder`; `name` tells one with modules from the plain one."""
    path = folder / f"initramfs-{bits}{name and '-' + name}.cpio"
    path.write_bytes(build(bits, line, modules))
    return path


def write_disk(folder: Path, line: str = REACHED) -> Path:
    """An ext4 file system with the same /init in 64 bits, for kernels that take no initramfs. Needs mke2fs."""
    path, root = folder / "disk.ext4", folder / "disk"
    if not path.exists():
        for name in ("dev", "proc", "sys"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "init").write_bytes(init_program(64, line))
        (root / "init").chmod(0o755)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", root, path, "8M"], check=True)
    return path


def init_program(bits: int, line: str = REACHED, modules: Sequence[str] = ()) -> bytes:
    """A static ELF that loads the files of `modules`, prints `line` on its standard output, reads up to a newline, and
    powers off."""
    header_size = 52 + 32 if bits == 32 else 64 + 56
    entry = _LOAD_AT + header_size
    make = _code32 if bits == 32 else _code64
    texts = _Texts(0)
    texts.start = entry + len(make(texts, line, modules))  # the code's length does not hang on the addresses in it
    code = make(texts, line, modules)
    size = header_size + len(code) + len(texts.data)
    identity = b"\x7fELF" + bytes((1 if bits == 32 else 2, 1, 1)) + bytes(9)
    read_execute = 5
    if bits == 32:
        # e_type EXEC, e_machine 386, one program header right behind the ELF header, no sections.
        head = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 40, 0, 0)
        load = struct.pack("<8I", 1, 0, _LOAD_AT, _LOAD_AT, size, size, read_execute, 0x1000)
    else:
        head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
        load = struct.pack("<IIQQQQQQ", 1, read_execute, 0, _LOAD_AT, _LOAD_AT, size, size, 0x1000)
    return identity + head + load + code + texts.data


class _Texts:
    """The strings behind the code: each stands once and has an address."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.data = b""
        self._places: dict[bytes, int] = {}

    def address(self, text: str) -> int:
        """Where `text` stands, ended by a zero byte."""
        data = text.encode() + b"\0"
        if data not in self._places:
            self._places[data] = len(self.data)
            self.data += data
        return self.start + self._places[data]


def _path(module: str) -> str:
    return f"/{module}.ko"


def _entry(inode: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _code32(texts: _Texts, line: str, modules: Sequence[str]) -> bytes:
    int80 = b"\xcd\x80"

    def put(text: str) -> bytes:
        return _mov32(eax=4, ebx=1, ecx=texts.address(text), edx=len(text.encode())) + int80

    def load(module: str) -> bytes:
        refused = put(f"{REFUSED}{module}\n")
        return (
            _mov32(eax=5, ebx=texts.address(_path(module)), ecx=0)  # open, for reading
            + int80
            + b"\x89\xc3"  # mov ebx, eax
            + _mov32(eax=350, ecx=texts.address(""), edx=0)  # finit_module
            + int80
            + b"\x85\xc0\x74"  # test eax, eax; jz
            + struct.pack("b", len(refused))
            + refused
        )

    read_byte = (
        _mov32(eax=3, edx=1)
        + b"\x31\xdb"  # xor ebx, ebx
        + b"\x89\xe1"  # mov ecx, esp
        + int80
        + b"\x83\xf8\x01"  # cmp eax, 1
        + b"\x75\x05"  # jne over the next two instructions
        + b"\x80\x39\x0a"  # cmp byte ptr [ecx], '\n'
    )
    read_line = read_byte + b"\x75" + struct.pack("b", -len(read_byte) - 2)  # jne to read again
    power_off = _mov32(eax=88, ebx=_MAGIC1, ecx=_MAGIC2, edx=_POWER_OFF) + b"\x31\xf6" + int80
    pause = _mov32(eax=29) + int80
    loads = b"".join(map(load, modules))
    return loads + put(line + "\n") + read_line + power_off + pause + b"\xeb" + struct.pack("b", -len(pause) - 2)


def _code64(texts: _Texts, line: str, modules: Sequence[str]) -> bytes:
    syscall = b"\x0f\x05"

    def put(text: str) -> bytes:
        return _mov32(eax=1, edi=1, esi=texts.address(text), edx=len(text.encode())) + syscall

    def load(module: str) -> bytes:
        refused = put(f"{REFUSED}{module}\n")
        return (
            _mov32(eax=2, edi=texts.address(_path(module)), esi=0)  # open, for reading
            + syscall
            + b"\x89\xc7"  # mov edi, eax
            + _mov32(eax=313, esi=texts.address(""), edx=0)  # finit_module
            + syscall
            + b"\x85\xc0\x74"  # test eax, eax; jz
            + struct.pack("b", len(refused))
            + refused
        )

    read_byte = (
        b"\x31\xc0"  # xor eax, eax
        b"\x31\xff"  # xor edi, edi
        b"\x48\x89\xe6"  # mov rsi, rsp
        + _mov32(edx=1)
        + syscall
        + b"\x83\xf8\x01"  # cmp eax, 1
        + b"\x75\x05"  # jne over the next two instructions
        + b"\x80\x3e\x0a"  # cmp byte ptr [rsi], '\n'
    )
    read_line = read_byte + b"\x75" + struct.pack("b", -len(read_byte) - 2)  # jne to read again
    power_off = _mov32(eax=169, edi=_MAGIC1, esi=_MAGIC2, edx=_POWER_OFF) + b"\x45\x31\xd2" + syscall
    pause = _mov32(eax=34) + syscall
    loads = b"".join(map(load, modules))
    return loads + put(line + "\n") + read_line + power_off + pause + b"\xeb" + struct.pack("b", -len(pause) - 2)


def _mov32(**registers: int) -> bytes:
    numbers = {"eax": 0, "ecx": 1, "edx": 2, "ebx": 3, "esi": 6, "edi": 7}
    return b"".join(bytes((0xB8 + numbers[r],)) + struct.pack("<I", value) for r, value in registers.items())
