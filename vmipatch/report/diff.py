"""What ``vmipatch diff`` prints."""

from __future__ import annotations

import sys

from vmipatch.image import Image
from vmipatch.patch.compare import Row
from vmipatch.report.jsontext import dumps
from vmipatch.report.scan import image_record, site_record


def as_json(image: Image, rows: list[Row], *, everything: bool) -> int:
    """One JSON document on standard output; returns how many sites are wrong."""
    wrong = sum(1 for row in rows if not row.right)
    record = {
        "schema": "vmipatch.diff/1",
        "image": image_record(image),
        "wrong": wrong,
        "sites": [
            {
                **site_record(image, row.site),
                "original": row.original.hex(),
                "patched": row.patched.hex(),
                "expected": row.expected.hex(),
                "right": row.right,
                "reason": row.patch.cause.reason if row.patch else None,
            }
            for row in rows
            if everything or not row.right or row.original != row.patched
        ],
    }
    sys.stdout.write(dumps(record) + "\n")
    return wrong


def as_table(image: Image, rows: list[Row], *, everything: bool) -> int:
    """Three columns a site; ``!`` marks what is not as expected.  Returns how many sites are wrong."""
    wrong = same = 0
    width = image.bits // 4 + 2
    print(f"  {'address':<{width}}  {'family':<15}  {'original':<26}  {'patched':<26}  {'expected':<26}  cause")
    for row in rows:
        wrong += not row.right
        if row.right and row.original == row.patched:
            same += 1
            if not everything:
                continue
        mark = " " if row.right else "!"
        columns = "  ".join(f"{code.hex():<26}" for code in (row.original, row.patched, row.expected))
        reason = row.patch.cause.reason if row.patch else "as on disk"
        print(f"{mark} {row.site.address:#0{width}x}  {row.site.family:<15}  {columns}  {reason}")
    print(f"{len(rows)} sites: {len(rows) - same - wrong} patched as expected, {same} as on disk, {wrong} wrong")
    return wrong
