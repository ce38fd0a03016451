"""``vmipatch run``: boot an image in the built-in emulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmipatch.emu.firmware.boot import BootOptions
    from vmipatch.emu.machine.board import BoardOptions
    from vmipatch.emu.machine.machine import Machine, Outcome

DEFAULT_LIMIT = 100_000_000_000  # a guest that runs wild ends by itself
REPLAY_LIMIT = 1_000_000_000  # a longer run is not repeated for its last instructions
REPLAY_LIMIT_UNCOMPILED = 3_000_000


def run(
    image: Annotated[
        Path,
        typer.Argument(metavar="IMAGE", help="vmlinux, bzImage, Multiboot kernel or BIOS ROM.", show_default=False),
    ],
    rom: Annotated[
        Path | None, typer.Option(metavar="ROM", help="An option ROM, shadowed and initialised before the kernel.")
    ] = None,
    rom_base: Annotated[str, typer.Option(metavar="PHYS", help="Physical address of the ROM.")] = "0xC0000",
    hypervisor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Stand by as this hypervisor: native, vmware, xen, kvm, lguest or l4ka."),
    ] = None,
    initrd: Annotated[Path | None, typer.Option(metavar="F", help="Initial RAM disk, or Multiboot module.")] = None,
    append: Annotated[str, typer.Option(metavar="S", help="Kernel command line.")] = "",
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory in MiB, 1 to 3072.")] = 128,
    until: Annotated[
        str | None, typer.Option(metavar="TEXT", help="End when the guest prints this; status 1 if it never does.")
    ] = None,
    max_instructions: Annotated[
        int | None, typer.Option(metavar="N", help="End after so many. [default: 100 thousand million]")
    ] = None,
    boot: Annotated[
        str, typer.Option(metavar="PROTOCOL", help="How to enter: auto, linux, pvh, multiboot or bios.")
    ] = "auto",
    date: Annotated[
        str, typer.Option(metavar="ISO", help="What the guest's clock shows at power-on (UTC).")
    ] = "2020-01-01T00:00:00",
    ns_per_instruction: Annotated[int, typer.Option(metavar="NS", help="Virtual time that an instruction takes.")] = 10,
    trace: Annotated[Path | None, typer.Option(metavar="F", help="Write a trace of events to this file.")] = None,
    trace_events: Annotated[
        str, typer.Option(metavar="LIST", help="Of instructions,memory,ports,interrupts,calls; or all.")
    ] = "ports,interrupts,calls",
    trace_addresses: Annotated[
        str, typer.Option(metavar="RANGE", help="Trace only instructions at these linear addresses.")
    ] = "0-0xFFFFFFFF",
    trace_ports: Annotated[str, typer.Option(metavar="RANGE", help="Trace only these ports.")] = "0-0xFFFF",
    trace_after: Annotated[int, typer.Option(metavar="N", help="Trace only from this count of instructions on.")] = 0,
    gdb: Annotated[int | None, typer.Option(metavar="PORT", help="Wait for gdb on this port (localhost).")] = None,
    screen: Annotated[bool, typer.Option("--screen", help="Show the text screen at the end (stderr).")] = False,
    json: Annotated[bool, typer.Option("--json", help="A summary as JSON on the last line.")] = False,
) -> None:
    """Boot an image in the built-in i386 emulator.

    The serial console is on standard output, the debug console (ports 0xE9 and 0x402) on standard error. Exit
    status 1 if the guest fails: a triple fault, a halt from which nothing wakes it, or --until not reached; and if
    it never called the hypervisor that was asked for.
    """
    import time

    from vmipatch.emu.cpu import COMPILED

    board, options, data = _options(image, rom, rom_base, initrd, append, memory, boot, date, ns_per_instruction)
    _check_hypervisor(hypervisor, rom, board.roms)
    tracing = _tracing(trace, trace_events, trace_addresses, trace_ports, trace_after, rom_base, options)
    _say(f"engine: {'compiled' if COMPILED else 'uncompiled (slow)'}")

    def build() -> Machine:
        from vmipatch.emu.firmware import boot as firmware
        from vmipatch.emu.machine.machine import Machine

        machine = Machine(board)
        if hypervisor is not None:
            from vmipatch.emu.hypervisors import create

            create(hypervisor).attach(machine)
        firmware.boot(machine, data, options, str(image))
        return machine

    machine = build()
    console = _Console()
    machine.board.consoles.listeners.append(console.put)
    began = time.perf_counter()
    try:
        with tracing as start_tracing:
            start_tracing(machine)
            if gdb is None:
                limit = DEFAULT_LIMIT if max_instructions is None else max_instructions
                outcome = machine.run(limit, until)
            else:
                outcome = _serve_gdb(machine, gdb, max_instructions)
    except KeyboardInterrupt:
        machine.stop("interrupted")
        outcome = machine.outcome()
    console.finish()
    seconds = time.perf_counter() - began
    if screen and machine.board.vga is not None:
        _say("\n".join(machine.board.vga.text()).rstrip())
    started = _started(machine, hypervisor)
    failed = _failed(outcome, until, max_instructions)
    summary = _summary(machine, outcome, seconds, COMPILED)
    stopped = machine.personality.violation if machine.personality is not None else None
    if stopped is not None:
        summary["violation"] = stopped.to_json()
        _say(f"{hypervisor} stopped the guest: {stopped}")
    if not started:
        _say(f"{hypervisor} was never started: the guest made no VMI_Init call of this ROM that was answered")
    if failed and outcome.reason != "poweroff":
        _post_mortem(machine, build, outcome, summary, COMPILED)
    _say(
        f"{outcome.reason} after {outcome.instructions:,} instructions, {outcome.virtual_ns / 1e9:.3f} s of "
        f"virtual time; {seconds:.2f} s, {outcome.instructions / max(seconds, 1e-9) / 1e6:.1f} MIPS"
    )
    if json:
        import json as encoder

        print(encoder.dumps(summary), flush=True)
    if failed or not (started or outcome.reason in ("limit", "interrupted", "ended by gdb")):
        raise typer.Exit(1)


def _options(
    image: Path,
    rom: Path | None,
    rom_base: str,
    initrd: Path | None,
    append: str,
    memory: int,
    boot: str,
    date: str,
    ns_per_instruction: int,
) -> tuple[BoardOptions, BootOptions, bytes]:
    """The options as the emulator takes them; raises for what makes no sense."""
    from datetime import UTC, datetime

    from vmipatch.emu.firmware.boot import PROTOCOLS, BootOptions, protocol_of
    from vmipatch.emu.machine.board import MEBIBYTE, BoardOptions, check_options
    from vmipatch.errors import UsageError

    if boot not in PROTOCOLS:
        raise UsageError(f"no boot protocol {boot!r}; there are: {', '.join(PROTOCOLS)}")
    try:
        base = int(rom_base, 0)
        start = datetime.fromisoformat(date).replace(tzinfo=UTC)
    except ValueError as error:
        raise UsageError(f"not an address or a date: {error}") from error
    data = _read(image)
    card = _read(rom) if rom is not None else None
    firmware = boot == "bios" or (boot == "auto" and protocol_of(data) == "bios")
    board = BoardOptions(
        ram_bytes=memory * MEBIBYTE,
        ns_per_instruction=ns_per_instruction,
        date=start,
        roms=() if card is None else (card,),
    )
    check_options(board)
    options = BootOptions(
        append=append,
        initrd=None if initrd is None else _read(initrd),
        rom=None if firmware else card,
        rom_base=base,
        protocol=boot,
    )
    return board, options, data


def _check_hypervisor(hypervisor: str | None, rom: Path | None, cards: tuple[bytes, ...]) -> None:
    """Refuse a hypervisor that the ROM cannot call, and say where a ROM has nothing to call."""
    from vmipatch.errors import UsageError
    from vmipatch.rombuild.hypervisor import names

    if hypervisor is not None and hypervisor not in names():
        raise UsageError(f"no hypervisor named {hypervisor!r}; there are: {', '.join(names())}")
    if rom is None:
        if hypervisor not in (None, "native"):
            raise UsageError(f"a guest reaches {hypervisor} through its ROM: give --rom (see vmipatch rom build)")
        return
    from vmipatch.rombuild import inspect

    tables = [i.vmi for card in cards for i in inspect.images(card) if i.vmi is not None]
    owners = {table.block.hypervisor or "nobody" for table in tables if table.block is not None}
    if hypervisor is None:
        for name in sorted(owners - {"nobody", "native"}):
            _say(f"this ROM is for {name}, and nothing stands by as it: see --hypervisor")
    elif not tables:
        raise UsageError(f"no VMI ROM: a guest does not find {hypervisor} through it", file=rom)
    elif owners and hypervisor not in owners:
        raise UsageError(f"made for {', '.join(sorted(owners))}, not for {hypervisor}", file=rom)


def _started(machine: Machine, hypervisor: str | None) -> bool:
    """Whether the hypervisor that was asked for ever ran the guest."""
    personality: Any = machine.personality
    return hypervisor in (None, "native") or bool(personality.active)


def _read(path: Path) -> bytes:
    from vmipatch.errors import EmulatorError

    try:
        return path.read_bytes()
    except OSError as error:
        raise EmulatorError(f"cannot be read: {error.strerror or error}", file=path) from error


class _Tracing:
    """The trace file, open for the time of the run."""

    def __init__(self, path: Path | None, wanted: Any) -> None:
        self._path = path
        self._wanted = wanted
        self._file: Any = None

    def __enter__(self) -> Callable[[Machine], None]:
        if self._path is not None:
            from vmipatch.errors import UsageError

            try:
                self._file = self._path.open("w", encoding="ascii")
            except OSError as error:
                raise UsageError(f"cannot be written: {error.strerror or error}", file=self._path) from error
        return self._start

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _start(self, machine: Machine) -> None:
        if self._file is not None:
            from vmipatch.emu.trace import Tracer

            Tracer(machine, self._file, self._wanted).attach()


def _tracing(
    path: Path | None, events: str, addresses: str, ports: str, after: int, rom_base: str, options: BootOptions
) -> _Tracing:
    if path is None:
        return _Tracing(None, None)
    from vmipatch.emu.trace import Filter, parse_kinds, parse_range

    rom = None
    if options.rom is not None:
        # A kernel calls the ROM through its direct map, a loader at its physical address.
        rom = (int(rom_base, 0), int(rom_base, 0) + len(options.rom) - 1)
    return _Tracing(
        path,
        Filter(
            kinds=parse_kinds(events),
            addresses=parse_range(addresses),
            after=after,
            ports=parse_range(ports),
            rom=rom,
        ),
    )


def _serve_gdb(machine: Machine, port: int, limit: int | None) -> Outcome:
    from vmipatch.emu.gdbstub import GdbServer

    server = GdbServer(machine, port, limit)
    _say(f"waiting for gdb: target remote localhost:{server.port}")
    ended = server.serve()
    if ended is None and server.detached:
        ended = machine.run(limit)
    if ended is None:
        machine.stop("ended by gdb")
        ended = machine.outcome()
    return ended


class _Console:
    """Serial console to standard output, debug console to standard error, flushed by lines."""

    def __init__(self) -> None:
        import sys

        self._streams = {"serial": sys.stdout.buffer, "debug": sys.stderr.buffer}
        self._last = {"serial": 10, "debug": 10}

    def put(self, console: str, byte: int) -> None:
        stream = self._streams[console]
        stream.write(bytes((byte,)))
        self._last[console] = byte
        if byte == 10:
            stream.flush()

    def finish(self) -> None:
        """End the guest's last line: what follows is ours."""
        for console, stream in self._streams.items():
            if self._last[console] != 10:
                stream.write(b"\n")
            stream.flush()


def _failed(outcome: Outcome, until: str | None, limit: int | None) -> bool:
    if until is not None:
        return outcome.reason != "until"
    if outcome.reason == "limit":
        return limit is None  # the user's own limit is an end like any other
    if outcome.reason == "debug exit":
        return outcome.exit_code != 1
    return outcome.reason not in ("poweroff", "reset", "interrupted", "ended by gdb")


def _summary(machine: Machine, outcome: Outcome, seconds: float, compiled: bool) -> dict[str, Any]:
    exits = dict(machine.exits)
    exits["port"] = machine.bus.port_accesses
    exits["device memory"] = machine.bus.mmio_accesses
    exits["interrupt"] = machine.bus.interrupts
    return {
        "schema": "vmipatch.run/1",
        "reason": outcome.reason,
        "instructions": outcome.instructions,
        "seconds": round(seconds, 6),
        "virtual_seconds": outcome.virtual_ns / 1e9,
        "exit_code": outcome.exit_code,
        "engine": "compiled" if compiled else "uncompiled",
        "exits": exits,
        "vmi_calls": dict(machine.vmi_calls),
        **({} if machine.personality is None else machine.personality.counts()),
    }


def _post_mortem(
    machine: Machine, build: Callable[[], Machine], outcome: Outcome, summary: dict[str, Any], compiled: bool
) -> None:
    from vmipatch.emu.machine import postmortem
    from vmipatch.emu.machine.machine import FAILURES

    values = postmortem.registers(machine)
    summary["registers"] = values
    affordable = outcome.instructions <= (REPLAY_LIMIT if compiled else REPLAY_LIMIT_UNCOMPILED)
    if outcome.reason in FAILURES and affordable:
        lines = postmortem.last_instructions(build, outcome.instructions)
        _say("last instructions:")
    else:
        lines = [postmortem.disassemble(machine)]
        _say("stopped at:")
    summary["last_instructions"] = lines
    for line in (*lines, *postmortem.register_lines(values)):
        _say("  " + line)


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)
