#!/usr/bin/env bash
# capstone 5.0.6 gives UD1 and UD0 no ModRM byte, so what stands behind them is decoded out of step.
#
# Intel's and AMD's manuals give both a ModRM byte (UD1 is 0F B9 /r), and Linux relies on it: every WARN of a kernel of
# 6.19 and later, and every trap of clang's UBSan, is a UD1 whose ModRM (and displacement) tells what it is about.
# Seen: `0F B9 CC 90` (ud1 of two registers, then nop) comes out as ud1, int3, nop; the five bytes of
# `67 48 0F B9 3A` as an instruction of four. Whoever looks for breakpoints in kernel text finds one at each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check capstone==5.0.6
"$folder/venv/bin/python" - <<'PY'
import capstone

decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
seen = {}
for code in ("0fb9cc90", "67480fb93a90", "0fffc090"):
    seen[code] = [(i.mnemonic, i.size) for i in decoder.disasm(bytes.fromhex(code), 0x1000)]
    print(code, seen[code])
assert seen["0fb9cc90"] == [("ud1", 2), ("int3", 1), ("nop", 1)], "UD1 is read otherwise now"
assert seen["67480fb93a90"][0] == ("ud1", 4), "UD1 with a memory operand is read otherwise now"
assert seen["0fffc090"][0] == ("ud0", 2), "UD0 is read otherwise now"
print("capstone 5.0.6: as described")
PY
