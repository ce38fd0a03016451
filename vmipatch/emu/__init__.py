"""The built-in i386 emulator: processor, machine, firmware, hypervisor personalities."""
