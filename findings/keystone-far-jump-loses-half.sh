#!/usr/bin/env bash
# keystone-engine 0.9.2 assembles a 32-bit far jump with a 16-bit offset: half of the address is gone, without a word.
#
# `ljmp 0x8:0x12345678` in 32-bit code is EA with four bytes of offset (Intel SDM vol. 2, JMP ptr16:32). Seen:
# `66 EA 78 56 08 00`, which jumps to 0x8:0x5678. The far call beside it, `lcall 0x8:0x12345678`, is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check keystone-engine==0.9.2
"$folder/venv/bin/python" - <<'PY'
import keystone

assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_32)
seen = {text: bytes(assembler.asm(text)[0]).hex() for text in ("ljmp 0x8:0x12345678", "lcall 0x8:0x12345678")}
for text, code in seen.items():
    print(f"{text:<22} {code}")
assert seen["ljmp 0x8:0x12345678"] == "66ea78560800", "it is assembled otherwise now"
assert seen["lcall 0x8:0x12345678"] == "9a785634120800", "the call is assembled otherwise now"
print("keystone-engine 0.9.2: as described")
PY
