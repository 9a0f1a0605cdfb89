"""Memory of the devices in use, as their runtime reports it."""

import resource
import sys

import jax


def peak_memory_bytes() -> int:
    """Most memory one device has held since the process began; on CPU the process's own peak."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(s and "peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats if s)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
