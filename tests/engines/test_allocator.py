"""Memory of a process: what the settings are for is measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.engines import allocator

# 500 numbers of rows through one weight; prints by how many megabytes the process grows after the first 100.
MANY_SHAPES = """
import torch
from pathlib import Path
from tutelage.engines import allocator
if {bounded}:
    allocator.bound_caches()

def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

weight = torch.randn(576, 576).bfloat16()
for rows in range(100, 600):
    torch.randn(rows, 576).bfloat16() @ weight
    if rows == 200:
        before = resident()
print(resident() - before)
"""

# Three rounds of many small tables held together, as activations are; prints the page faults of the last.
ROUNDS = """
import resource, torch
from tutelage.engines import allocator
if {kept}:
    allocator.keep_pages()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(500_000) for _ in range(60)]
    del held
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    {between}
print(faults)
"""

GLIBC = sys.platform == "linux" and Path("/proc/self/status").is_file()


def run(program: str) -> float:
    names = ("MALLOC_", "LRU_CACHE", "ONEDNN_", "LD_PRELOAD", "GLIBC_TUNABLES")
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(names)} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=surroundings, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not GLIBC, reason="reads Linux's figures of a process")
def test_products_of_many_shapes_do_not_fill_the_memory() -> None:
    import torch

    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this processor's bfloat16 products are not compiled by shape")
    free, bounded = (run(MANY_SHAPES.format(bounded=b)) for b in (False, True))
    assert free > 60, "else there is nothing to bound"
    assert bounded < 0.5 * free


@pytest.mark.skipif(not GLIBC, reason="reads Linux's figures of a process")
def test_pages_stay_within_a_stage_and_go_back_between_stages() -> None:
    if not allocator.keep_pages():
        pytest.skip("the allocator is not glibc's, or is set by the user")
    given_back, kept = (run(ROUNDS.format(kept=k, between="")) for k in (False, True))
    if given_back < 5_000:  # 120 MB are 29,000 pages of 4 KB
        pytest.skip(f"the kernel gave huge pages: {given_back:.0f} faults are too few to tell apart")
    released = run(ROUNDS.format(kept=True, between="allocator.release_pages()"))
    assert kept < 0.1 * given_back
    assert released > 5 * max(kept, 1)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    allocator.bound_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) >= 64
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not allocator.keep_pages.__wrapped__()
