"""A GDB remote serial protocol server: a stock ``gdb`` drives the machine.

May import :mod:`vmipatch.emu.machine` and ``vmipatch.errors``.  Facts: GDB
manual, appendix "Remote Protocol" (packets, target descriptions, stop
replies).  One client, one thread, all stop.  Addresses are linear; the
debugger's memory accesses go through the guest's page tables and set no
accessed or dirty bits.
"""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING

from vmipatch.emu.machine import linear
from vmipatch.errors import EmulatorError, VmipatchError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine, Outcome

SLICE = 500_000  # instructions between two looks for Ctrl-C
MAX_PACKET = 0x4000
SIGINT, SIGTRAP, SIGSEGV = 2, 5, 11
GENERAL = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags")
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
FPU = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
POINTERS = {"fiseg": "fpu_cs", "fioff": "fpu_ip", "foseg": "fpu_ds", "fooff": "fpu_dp", "fop": "fpu_opcode"}
FLAGS = (
    ("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9), ("DF", 10), ("OF", 11),
    ("NT", 14), ("RF", 16), ("VM", 17), ("AC", 18), ("VIF", 19), ("VIP", 20), ("ID", 21),
)  # fmt: skip


def target_description() -> bytes:
    """The target.xml: the core i386 feature, in the order of the ``g`` packet."""
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target><architecture>i386</architecture>",
        '<feature name="org.gnu.gdb.i386.core">',
        '<flags id="i386_eflags" size="4">',
        *[f'<field name="{name}" start="{bit}" end="{bit}"/>' for name, bit in FLAGS],
        "</flags>",
    ]
    kinds = {"esp": "data_ptr", "ebp": "data_ptr", "eip": "code_ptr", "eflags": "i386_eflags"}
    for name in GENERAL:
        lines.append(f'<reg name="{name}" bitsize="32" type="{kinds.get(name, "int32")}"/>')
    for name in SEGMENTS:
        lines.append(f'<reg name="{name}" bitsize="32" type="int32"/>')
    for index in range(8):
        lines.append(f'<reg name="st{index}" bitsize="80" type="i387_ext"/>')
    for name in FPU:
        lines.append(f'<reg name="{name}" bitsize="32" type="int" group="float"/>')
    lines.append("</feature></target>")
    return "\n".join(lines).encode("ascii")


REGISTERS: tuple[tuple[str, int], ...] = (
    *((name, 4) for name in (*GENERAL, *SEGMENTS)),
    *((f"st{index}", 10) for index in range(8)),
    *((name, 4) for name in FPU),
)


class Closed(Exception):
    """The client went away."""


class GdbServer:
    """Serves one client; :meth:`serve` returns when it detaches, kills or disconnects."""

    def __init__(self, machine: Machine, port: int, limit: int | None = None) -> None:
        """Listen on the loopback interface; port 0 takes a free one (see ``port``).

        Raises :class:`EmulatorError` when the port is taken.
        """
        self.machine = machine
        self.limit = limit
        self.outcome: Outcome | None = None
        self.detached = False
        self._acknowledge = True
        self._client: socket.socket | None = None
        self._input = bytearray()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            self._listener.close()
            raise EmulatorError(f"cannot listen on port {port} for gdb: {error}") from error
        self._listener.listen(1)
        self.port: int = self._listener.getsockname()[1]

    def serve(self) -> Outcome | None:
        """Wait for a client and obey it; returns the guest's end if it came to one."""
        self._client, _ = self._listener.accept()
        self._listener.close()
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while self._command(self._packet()):
                pass
        except (Closed, OSError):
            pass
        finally:
            self._client.close()
        return self.outcome

    # --- packets ------------------------------------------------------------------------

    def _byte(self) -> int:
        while not self._input:
            assert self._client is not None
            data = self._client.recv(4096)
            if not data:
                raise Closed
            self._input += data
        return self._input.pop(0)

    def _packet(self) -> bytes:
        """The next packet's payload, unescaped; b"\\x03" for an interrupt."""
        while True:
            byte = self._byte()
            if byte == 3:
                return b"\x03"
            if byte != ord("$"):
                continue
            raw, total = bytearray(), 0
            while (byte := self._byte()) != ord("#"):
                raw.append(byte)
                total += byte
                if len(raw) > 4 * MAX_PACKET:
                    raise Closed
            try:
                sent = int(bytes((self._byte(), self._byte())), 16)
            except ValueError:
                sent = -1
            if sent != total & 0xFF:
                self._raw(b"-")
                continue
            if self._acknowledge:
                self._raw(b"+")
            return _unescape(bytes(raw))

    def _raw(self, data: bytes) -> None:
        assert self._client is not None
        self._client.sendall(data)

    def _send(self, payload: bytes) -> None:
        escaped = bytearray()
        for byte in payload:
            if byte in b"#$}*":
                escaped += bytes((0x7D, byte ^ 0x20))
            else:
                escaped.append(byte)
        self._raw(b"$" + escaped + b"#%02x" % (sum(escaped) & 0xFF))

    # --- commands -----------------------------------------------------------------------

    def _command(self, packet: bytes) -> bool:
        """Obey one packet; False at the end of the session."""
        kind, rest = packet[:1], packet[1:].decode("latin-1")
        if kind == b"k":
            return False
        if kind == b"D":
            self._send(b"OK")
            self.detached = True
            return False
        if packet.startswith(b"vKill"):
            self._send(b"OK")
            return False
        try:
            reply = self._answer(kind, packet, rest)
        except (ValueError, IndexError, VmipatchError):
            reply = b"E01"
        if packet == b"QStartNoAckMode":
            self._send(b"OK")
            self._acknowledge = False
        else:
            self._send(reply)
        return True

    def _answer(self, kind: bytes, packet: bytes, rest: str) -> bytes:
        if kind == b"?":
            return self._stopped(SIGTRAP)
        if kind in (b"c", b"s", b"C", b"S"):
            return self._resume(kind, rest)
        if packet == b"vCont?":
            return b"vCont;c;C;s;S"
        if packet.startswith(b"vCont;"):
            action = rest[5:].partition(":")[0]
            return self._resume(action[:1].encode(), "")
        if kind == b"g":
            return b"".join(self._register(index) for index in range(len(REGISTERS)))
        if kind == b"G":
            return self._write_all(bytes.fromhex(rest))
        if kind == b"p":
            index = int(rest, 16)
            return self._register(index) if index < len(REGISTERS) else b"E01"
        if kind == b"P":
            name, _, value = rest.partition("=")
            return self._write_register(int(name, 16), bytes.fromhex(value))
        if kind == b"m":
            return self._read_memory(rest)
        if kind in (b"M", b"X"):
            return self._write_memory(kind, packet)
        if kind in (b"Z", b"z"):
            return self._break(kind == b"Z", rest)
        if kind == b"q":
            return self._query(rest)
        return b"OK" if kind in (b"H", b"T") or packet == b"\x03" else b""

    def _query(self, rest: str) -> bytes:
        if rest.startswith("Supported"):
            return b"PacketSize=%x;qXfer:features:read+;swbreak+;hwbreak+;QStartNoAckMode+;vContSupported+" % (
                MAX_PACKET
            )
        if rest.startswith("Xfer:features:read:target.xml:"):
            offset, length = (int(part, 16) for part in rest.rpartition(":")[2].split(","))
            text = target_description()
            part = text[offset : offset + min(length, MAX_PACKET // 2)]
            return (b"m" if offset + len(part) < len(text) else b"l") + part
        simple = {"Attached": b"1", "C": b"QC1", "fThreadInfo": b"m1", "sThreadInfo": b"l"}
        return simple.get(rest, b"")

    # --- registers and memory -------------------------------------------------------------

    def _register(self, index: int) -> bytes:
        name, size = REGISTERS[index]
        cpu = self.machine.cpu
        value = int(getattr(cpu, POINTERS[name]) if name in POINTERS else cpu.get(name))
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little").hex().encode()

    def _write_register(self, index: int, data: bytes) -> bytes:
        name, _ = REGISTERS[index]
        value = int.from_bytes(data, "little")
        if name in POINTERS:
            setattr(self.machine.cpu, POINTERS[name], value)
        else:
            self.machine.cpu.set(name, value)
        return b"OK"

    def _write_all(self, data: bytes) -> bytes:
        at = 0
        for index, (_, size) in enumerate(REGISTERS):
            part = data[at : at + size]
            # Only what changed: writing a selector loads its descriptor anew.
            if len(part) == size and part.hex().encode() != self._register(index):
                self._write_register(index, part)
            at += size
        return b"OK"

    def _read_memory(self, rest: str) -> bytes:
        address, length = (int(part, 16) for part in rest.split(","))
        data = linear.read(self.machine, address, min(length, MAX_PACKET // 2 - 8))
        return data.hex().encode() if data or not length else b"E14"

    def _write_memory(self, kind: bytes, packet: bytes) -> bytes:
        head, _, body = packet[1:].partition(b":")
        address, length = (int(part, 16) for part in head.decode("latin-1").split(","))
        data = bytes.fromhex(body.decode("latin-1")) if kind == b"M" else body
        if len(data) != length:
            return b"E01"
        linear.write(self.machine, address, data)
        return b"OK"

    def _break(self, insert: bool, rest: str) -> bytes:
        kind, place, size = rest.split(";")[0].split(",")
        address, length = int(place, 16), int(size, 16)
        cpu = self.machine.cpu
        if kind in "01":
            (cpu.add_breakpoint if insert else cpu.remove_breakpoint)(address)
            return b"OK"
        if kind in "234":
            change = cpu.add_watchpoint if insert else cpu.remove_watchpoint
            change(address, length, read=kind in "34", write=kind in "24")
            return b"OK"
        return b""

    # --- running ---------------------------------------------------------------------------

    def _resume(self, action: bytes, rest: str) -> bytes:
        if action in (b"c", b"s") and rest:
            self.machine.cpu.set("eip", int(rest, 16))
        machine = self.machine
        if action in (b"s", b"S"):
            return self._reply(machine.run(limit=machine.cpu.instructions + 1))
        while True:
            stop = machine.cpu.instructions + SLICE
            if self.limit is not None:
                stop = min(stop, self.limit)
            outcome = machine.run(limit=stop)
            if outcome.reason != "limit" or outcome.instructions >= (self.limit or 1 << 62):
                return self._reply(outcome)
            if self._interrupted():
                return self._stopped(SIGINT)

    def _interrupted(self) -> bool:
        assert self._client is not None
        readable, _, _ = select.select([self._client], [], [], 0)
        if readable:
            data = self._client.recv(4096)
            if not data:
                raise Closed
            self._input += data
        # It may have come along with the packet that started the guest.
        if 3 in self._input:
            self._input.remove(3)
            return True
        return False

    def _reply(self, outcome: Outcome) -> bytes:
        reason = outcome.reason
        if reason == "watchpoint":
            return b"T05watch:%x;thread:1;" % self.machine.cpu.exit_address
        if reason in ("breakpoint", "stopped") or (
            reason == "limit" and (self.limit is None or outcome.instructions < self.limit)
        ):
            return self._stopped(SIGTRAP)
        self.outcome = outcome
        if reason in ("triple fault", "halt"):
            return self._stopped(SIGSEGV)
        return b"W00"

    def _stopped(self, signal: int) -> bytes:
        return b"T%02xthread:1;" % signal


def _unescape(data: bytes) -> bytes:
    out = bytearray()
    escaped = False
    for byte in data:
        if escaped:
            out.append(byte ^ 0x20)
            escaped = False
        elif byte == 0x7D:
            escaped = True
        else:
            out.append(byte)
    return bytes(out)
