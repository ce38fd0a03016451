#!/usr/bin/env bash
# keystone-engine 0.9.2 writes `nop dword ptr [rax]` as 0F 18 /4, not as the documented multi-byte NOP 0F 1F /0.
#
# Both SDMs list 0F 1F /0 alone as NOP with an operand; 0F 18 is the group of prefetch hints, of which /4 is reserved.
# It does nothing on a processor of today, but kernels, debuggers and disassemblers that know nops by their bytes do
# not know this one: Linux pads with the sequences of arch/x86/include/asm/nops.h and compares with them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check keystone-engine==0.9.2
"$folder/venv/bin/python" - <<'PY'
import keystone

assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64)
seen = {text: bytes(assembler.asm(text)[0]).hex() for text in ("nop", "nop dword ptr [rax]", "nop dword ptr [rax+rax]")}
for text, code in seen.items():
    print(f"{text:<24} {code}")
assert seen["nop"] == "90"
assert seen["nop dword ptr [rax]"] == "0f1820", "it is assembled otherwise now"
assert seen["nop dword ptr [rax+rax]"] == "0f182400", "it is assembled otherwise now"
print("keystone-engine 0.9.2: as described")
PY
