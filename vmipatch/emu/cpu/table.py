"""The opcode table: every instruction of the processor, once.

May import nothing of the package.  The decoder's tables, the engine's handlers
and the generated tests are all made from these rows.

A row is ``opcode[/reg] mnemonic operands attributes``.  The opcode is one byte
or ``0F`` and one byte; ``/n`` is the ModRM reg field of a group; ``+r`` means
eight opcodes with a register in the low three bits, ``+c`` sixteen with a
condition.  Operands are written as in Intel's opcode maps (SDM 2, appendix A):
E is ModRM r/m, G the reg field, Z the register of the opcode, I an immediate
(``Is`` one byte, sign extended), J a relative target, M memory only, R register
only, O an absolute offset, A a far pointer, S C D segment, control and debug
registers; b is a byte, w a word, d a doubleword, v and z follow the operand
size.  Attributes:

``lock``   LOCK is allowed when the destination is memory
``cpl0``   #GP(0) outside CPL 0
``iopl``   #GP(0) when CPL is above IOPL (and the bitmap forbids it, for I/O)
``end``    the instruction ends a block of decoded records
``x=NAME`` the class by which a host can ask to see the instruction
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = """
00 add Eb,Gb lock
01 add Ev,Gv lock
02 add Gb,Eb
03 add Gv,Ev
04 add AL,Ib
05 add eAX,Iz
06 push ES
07 pop ES
08 or Eb,Gb lock
09 or Ev,Gv lock
0A or Gb,Eb
0B or Gv,Ev
0C or AL,Ib
0D or eAX,Iz
0E push CS
10 adc Eb,Gb lock
11 adc Ev,Gv lock
12 adc Gb,Eb
13 adc Gv,Ev
14 adc AL,Ib
15 adc eAX,Iz
16 push SS
17 pop SS end
18 sbb Eb,Gb lock
19 sbb Ev,Gv lock
1A sbb Gb,Eb
1B sbb Gv,Ev
1C sbb AL,Ib
1D sbb eAX,Iz
1E push DS
1F pop DS
20 and Eb,Gb lock
21 and Ev,Gv lock
22 and Gb,Eb
23 and Gv,Ev
24 and AL,Ib
25 and eAX,Iz
27 daa
28 sub Eb,Gb lock
29 sub Ev,Gv lock
2A sub Gb,Eb
2B sub Gv,Ev
2C sub AL,Ib
2D sub eAX,Iz
2F das
30 xor Eb,Gb lock
31 xor Ev,Gv lock
32 xor Gb,Eb
33 xor Gv,Ev
34 xor AL,Ib
35 xor eAX,Iz
37 aaa
38 cmp Eb,Gb
39 cmp Ev,Gv
3A cmp Gb,Eb
3B cmp Gv,Ev
3C cmp AL,Ib
3D cmp eAX,Iz
3F aas
40+r inc Zv
48+r dec Zv
50+r push Zv
58+r pop Zv
60 pusha
61 popa
62 bound Gv,M
63 arpl Ew,Gw
68 push Iz
69 imul Gv,Ev,Iz
6A push Is
6B imul Gv,Ev,Is
6C insb iopl end x=io
6D insv iopl end x=io
6E outsb iopl end x=io
6F outsv iopl end x=io
70+c jcc Jb end
80/0 add Eb,Ib lock
80/1 or Eb,Ib lock
80/2 adc Eb,Ib lock
80/3 sbb Eb,Ib lock
80/4 and Eb,Ib lock
80/5 sub Eb,Ib lock
80/6 xor Eb,Ib lock
80/7 cmp Eb,Ib
81/0 add Ev,Iz lock
81/1 or Ev,Iz lock
81/2 adc Ev,Iz lock
81/3 sbb Ev,Iz lock
81/4 and Ev,Iz lock
81/5 sub Ev,Iz lock
81/6 xor Ev,Iz lock
81/7 cmp Ev,Iz
82/0 add Eb,Ib lock
82/1 or Eb,Ib lock
82/2 adc Eb,Ib lock
82/3 sbb Eb,Ib lock
82/4 and Eb,Ib lock
82/5 sub Eb,Ib lock
82/6 xor Eb,Ib lock
82/7 cmp Eb,Ib
83/0 add Ev,Is lock
83/1 or Ev,Is lock
83/2 adc Ev,Is lock
83/3 sbb Ev,Is lock
83/4 and Ev,Is lock
83/5 sub Ev,Is lock
83/6 xor Ev,Is lock
83/7 cmp Ev,Is
84 test Eb,Gb
85 test Ev,Gv
86 xchg Eb,Gb lock
87 xchg Ev,Gv lock
88 mov Eb,Gb
89 mov Ev,Gv
8A mov Gb,Eb
8B mov Gv,Ev
8C movfs Ev,Sw
8D lea Gv,M
8E movts Sw,Ew end
8F/0 pope Ev
90 nop
91 xchg Zv,eAX
92 xchg Zv,eAX
93 xchg Zv,eAX
94 xchg Zv,eAX
95 xchg Zv,eAX
96 xchg Zv,eAX
97 xchg Zv,eAX
98 cbw
99 cwd
9A callf A end
9B wait
9C pushf x=flags
9D popf end x=flags
9E sahf
9F lahf
A0 mov AL,Ob
A1 mov eAX,Ov
A2 mov Ob,AL
A3 mov Ov,eAX
A4 movsb
A5 movsv
A6 cmpsb
A7 cmpsv
A8 test AL,Ib
A9 test eAX,Iz
AA stosb
AB stosv
AC lodsb
AD lodsv
AE scasb
AF scasv
B0+r mov Zb,Ib
B8+r mov Zv,Iz
C0/0 rol Eb,Ib
C0/1 ror Eb,Ib
C0/2 rcl Eb,Ib
C0/3 rcr Eb,Ib
C0/4 shl Eb,Ib
C0/5 shr Eb,Ib
C0/6 shl Eb,Ib
C0/7 sar Eb,Ib
C1/0 rol Ev,Ib
C1/1 ror Ev,Ib
C1/2 rcl Ev,Ib
C1/3 rcr Ev,Ib
C1/4 shl Ev,Ib
C1/5 shr Ev,Ib
C1/6 shl Ev,Ib
C1/7 sar Ev,Ib
C2 ret Iw end
C3 ret end
C4 les Gv,M
C5 lds Gv,M
C6/0 mov Eb,Ib
C7/0 mov Ev,Iz
C8 enter Iw,Ib
C9 leave
CA retf Iw end
CB retf end
CC int3 end
CD int Ib end
CE into end
CF iret end x=iret
D0/0 rol Eb,1
D0/1 ror Eb,1
D0/2 rcl Eb,1
D0/3 rcr Eb,1
D0/4 shl Eb,1
D0/5 shr Eb,1
D0/6 shl Eb,1
D0/7 sar Eb,1
D1/0 rol Ev,1
D1/1 ror Ev,1
D1/2 rcl Ev,1
D1/3 rcr Ev,1
D1/4 shl Ev,1
D1/5 shr Ev,1
D1/6 shl Ev,1
D1/7 sar Ev,1
D2/0 rol Eb,CL
D2/1 ror Eb,CL
D2/2 rcl Eb,CL
D2/3 rcr Eb,CL
D2/4 shl Eb,CL
D2/5 shr Eb,CL
D2/6 shl Eb,CL
D2/7 sar Eb,CL
D3/0 rol Ev,CL
D3/1 ror Ev,CL
D3/2 rcl Ev,CL
D3/3 rcr Ev,CL
D3/4 shl Ev,CL
D3/5 shr Ev,CL
D3/6 shl Ev,CL
D3/7 sar Ev,CL
D4 aam Ib
D5 aad Ib
D6 salc
D7 xlat
D8 fpu E
D9 fpu E
DA fpu E
DB fpu E
DC fpu E
DD fpu E
DE fpu E
DF fpu E
E0 loopne Jb end
E1 loope Jb end
E2 loop Jb end
E3 jcxz Jb end
E4 inb Ib iopl end x=io
E5 inv Ib iopl end x=io
E6 outb Ib iopl end x=io
E7 outv Ib iopl end x=io
E8 call Jz end
E9 jmp Jz end
EA jmpf A end
EB jmp Jb end
EC inb DX iopl end x=io
ED inv DX iopl end x=io
EE outb DX iopl end x=io
EF outv DX iopl end x=io
F1 int1 end
F4 hlt cpl0 end x=hlt
F5 cmc
F6/0 test Eb,Ib
F6/1 test Eb,Ib
F6/2 not Eb lock
F6/3 neg Eb lock
F6/4 mul Eb
F6/5 imul1 Eb
F6/6 div Eb
F6/7 idiv Eb
F7/0 test Ev,Iz
F7/1 test Ev,Iz
F7/2 not Ev lock
F7/3 neg Ev lock
F7/4 mul Ev
F7/5 imul1 Ev
F7/6 div Ev
F7/7 idiv Ev
F8 clc
F9 stc
FA cli iopl x=cli
FB sti iopl end x=sti
FC cld
FD std
FE/0 inc Eb lock
FE/1 dec Eb lock
FF/0 inc Ev lock
FF/1 dec Ev lock
FF/2 call Ev end
FF/3 callf M end
FF/4 jmp Ev end
FF/5 jmpf M end
FF/6 push Ev
0F 00/0 sldt Ew x=table
0F 00/1 str Ew x=table
0F 00/2 lldt Ew cpl0 x=table
0F 00/3 ltr Ew cpl0 x=table
0F 00/4 verr Ew
0F 00/5 verw Ew
0F 01/0 sgdt M x=table
0F 01/0 vmcall R x=vmcall
0F 01/1 sidt M x=table
0F 01/2 lgdt M cpl0 x=table
0F 01/3 lidt M cpl0 x=table
0F 01/4 smsw Ew x=cr
0F 01/6 lmsw Ew cpl0 end x=cr
0F 01/7 invlpg M cpl0 end x=invlpg
0F 02 lar Gv,Ew
0F 03 lsl Gv,Ew
0F 06 clts cpl0 x=cr
0F 08 invd cpl0 x=cache
0F 09 wbinvd cpl0 x=cache
0F 0B ud2
0F 0D prefetch Eb
0F 18 hintnop Ev
0F 19 hintnop Ev
0F 1A hintnop Ev
0F 1B hintnop Ev
0F 1C hintnop Ev
0F 1D hintnop Ev
0F 1E hintnop Ev
0F 1F hintnop Ev
0F 20 movfc Rd,Cd cpl0 x=cr
0F 21 movfd Rd,Dd cpl0 x=dr
0F 22 movtc Cd,Rd cpl0 end x=cr
0F 23 movtd Dd,Rd cpl0 end x=dr
0F 30 wrmsr cpl0 end x=msr
0F 31 rdtsc x=tsc
0F 32 rdmsr cpl0 x=msr
0F 33 rdpmc x=tsc
0F 34 sysenter end
0F 35 sysexit cpl0 end x=iret
0F 40+c cmov Gv,Ev
0F 80+c jcc Jz end
0F 90+c set Eb
0F A0 push FS
0F A1 pop FS
0F A2 cpuid x=cpuid
0F A3 bt Ev,Gv
0F A4 shld Ev,Gv,Ib
0F A5 shld Ev,Gv,CL
0F A8 push GS
0F A9 pop GS
0F AB bts Ev,Gv lock
0F AC shrd Ev,Gv,Ib
0F AD shrd Ev,Gv,CL
0F AE/0 fxsave M
0F AE/1 fxrstor M
0F AF imul Gv,Ev
0F B0 cmpxchg Eb,Gb lock
0F B1 cmpxchg Ev,Gv lock
0F B2 lss Gv,M end
0F B3 btr Ev,Gv lock
0F B4 lfs Gv,M
0F B5 lgs Gv,M
0F B6 movzx Gv,Eb
0F B7 movzx Gv,Ew
0F B9 ud1 Ev
0F BA/4 bt Ev,Ib
0F BA/5 bts Ev,Ib lock
0F BA/6 btr Ev,Ib lock
0F BA/7 btc Ev,Ib lock
0F BB btc Ev,Gv lock
0F BC bsf Gv,Ev
0F BD bsr Gv,Ev
0F BE movsx Gv,Eb
0F BF movsx Gv,Ew
0F C0 xadd Eb,Gb lock
0F C1 xadd Ev,Gv lock
0F C7/1 cmpxchg8b M lock
0F C8+r bswap Zv
"""

# Flags each mnemonic writes, and those of them that the SDM leaves undefined.
FLAGS = {
    "add": ("oszapc", ""),
    "or": ("oszapc", "a"),
    "adc": ("oszapc", ""),
    "sbb": ("oszapc", ""),
    "and": ("oszapc", "a"),
    "sub": ("oszapc", ""),
    "xor": ("oszapc", "a"),
    "cmp": ("oszapc", ""),
    "test": ("oszapc", "a"),
    "inc": ("oszap", ""),
    "dec": ("oszap", ""),
    "neg": ("oszapc", ""),
    "daa": ("oszapc", "o"),
    "das": ("oszapc", "o"),
    "aaa": ("oszapc", "oszp"),
    "aas": ("oszapc", "oszp"),
    "aam": ("oszapc", "oac"),
    "aad": ("oszapc", "oac"),
    "imul": ("oszapc", "szap"),
    "imul1": ("oszapc", "szap"),
    "mul": ("oszapc", "szap"),
    "div": ("oszapc", "oszapc"),
    "idiv": ("oszapc", "oszapc"),
    # OF after a rotate or shift by other than 1, CF after SHL/SHR past the operand's size
    # depend on the count: see undefined_flags.
    "rol": ("oc", ""),
    "ror": ("oc", ""),
    "rcl": ("oc", ""),
    "rcr": ("oc", ""),
    "shl": ("oszapc", "a"),
    "shr": ("oszapc", "a"),
    "sar": ("oszapc", "a"),
    "shld": ("oszapc", "a"),
    "shrd": ("oszapc", "a"),
    "bt": ("c", "oszap"),
    "bts": ("c", "oszap"),
    "btr": ("c", "oszap"),
    "btc": ("c", "oszap"),
    "bsf": ("z", "osapc"),
    "bsr": ("z", "osapc"),
    "xadd": ("oszapc", ""),
    "cmpxchg": ("oszapc", ""),
    "cmpxchg8b": ("z", ""),
    "cmpsb": ("oszapc", ""),
    "cmpsv": ("oszapc", ""),
    "scasb": ("oszapc", ""),
    "scasv": ("oszapc", ""),
    "sahf": ("szapc", ""),
    "cmc": ("c", ""),
    "clc": ("c", ""),
    "stc": ("c", ""),
    "arpl": ("z", ""),
    "lar": ("z", ""),
    "lsl": ("z", ""),
    "verr": ("z", ""),
    "verw": ("z", ""),
    "popf": ("oszapc", ""),
    "iret": ("oszapc", ""),
}

CLASSES = (
    "cli", "sti", "hlt", "io", "cr", "dr", "table", "invlpg", "cpuid", "tsc", "msr", "iret", "flags", "cache", "vmcall",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row: ``two_byte`` tells the 0F map, ``group`` is the ModRM reg field or -1."""

    two_byte: bool
    opcode: int
    group: int
    mnemonic: str
    operands: tuple[str, ...]
    lock: bool
    privilege: str
    end: bool
    exit_class: str
    condition: int

    @property
    def has_modrm(self) -> bool:
        """Whether a ModRM byte follows the opcode."""
        return self.group >= 0 or any(o in WITH_MODRM for o in self.operands)

    @property
    def written_flags(self) -> str:
        """Letters of the flags that the instruction writes."""
        return FLAGS.get(self.mnemonic, ("", ""))[0]

    @property
    def undefined_flags(self) -> str:
        """Letters of the flags that are undefined after it, whatever the operands."""
        return FLAGS.get(self.mnemonic, ("", ""))[1]


WITH_MODRM = frozenset(["E", "Eb", "Ew", "Ev", "Gb", "Gw", "Gv", "M", "R", "Sw", "Cd", "Dd", "Rd"])
SEGMENT_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS")


def rows() -> list[Row]:
    """The table, one row per opcode (``+r`` and ``+c`` spread out)."""
    result = []
    for line in ROWS.strip().splitlines():
        words = line.split()
        two_byte = words[0] == "0F"
        if two_byte:
            words = words[1:]
        code, mnemonic, rest = words[0], words[1], words[2:]
        operands: tuple[str, ...] = ()
        known = ("lock", "cpl0", "iopl", "end")
        if rest and rest[0] not in known and not rest[0].startswith("x="):
            operands = tuple(rest[0].split(","))
            rest = rest[1:]
        group = int(code.split("/")[1]) if "/" in code else -1
        count = 8 if code.endswith("+r") else 16 if code.endswith("+c") else 1
        first = int(code[:2], 16)
        privilege = "cpl0" if "cpl0" in rest else "iopl" if "iopl" in rest else ""
        exit_class = next((w[2:] for w in rest if w.startswith("x=")), "")
        result += [
            Row(
                two_byte,
                first + i,
                group,
                mnemonic,
                operands,
                "lock" in rest,
                privilege,
                "end" in rest,
                exit_class,
                i if count == 16 else -1,
            )
            for i in range(count)
        ]
    return result
