"""Keeps long test processes within the system's limit of memory mappings."""

import gc
from pathlib import Path

import jax

MAPPINGS = Path("/proc/self/maps")
# Linux allows 65,530 by default; a compiled program takes several, and beyond the limit jaxlib crashes.
MOST_MAPPINGS = 30_000


def pytest_runtest_teardown(item, nextitem):
    """Between modules only: within one, tests may share programs and count them."""
    if nextitem is not None and nextitem.path == item.path:
        return
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
