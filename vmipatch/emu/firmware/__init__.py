"""Firmware on the host's side: boot protocols, a small BIOS, option ROMs, raw BIOS images."""
