"""The machine around the processor: bus, devices, time, run loop, snapshots."""
