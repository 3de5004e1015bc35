"""How a process holds memory: pages that tensors freed stay, and caches of compiled products are bounded.

By default glibc returns a large block to the system as soon as it is freed. A training step frees and
takes hundreds of megabytes of activations, and touching a fresh page costs more than the addition that
is done in it: attention by plain products was half as fast before (docs/log.md). What a stage leaves
behind, though, has holes that the next one's blocks do not fit into, so between stages pages go back.

oneDNN compiles a product anew for every number of rows, and torch keeps a thousand of them, half a
megabyte each. Packs differ in length, so a run would fill that cache and use most of it only once.
"""

from __future__ import annotations

import ctypes
import functools
import os

__all__ = ["bound_caches", "keep_pages", "release_pages"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of malloc.h
_LARGEST_HEAP_BLOCK = 32 << 20  # bytes; the largest value glibc takes
_PRODUCTS = 128  # a learning step uses about 50


def bound_caches() -> None:
    """Bound torch's and oneDNN's caches of compiled products, unless the user has; before the first product."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRODUCTS))


@functools.cache
def keep_pages() -> bool:
    """Set this process's allocator, once. False where it is not glibc's, or where the user has set it."""
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def release_pages() -> None:
    """Give back all pages that nothing lies in; called where one kind of work ends and another begins."""
    if keep_pages():
        ctypes.CDLL(None).malloc_trim(0)
