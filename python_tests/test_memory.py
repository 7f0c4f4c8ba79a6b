import subprocess
import sys

FAULTS = """
import resource, sys
import torch
from crpt.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (40, 100, 70):
        torch.empty(size << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(8):  # until the heap has found its shape
    faults()
print(faults())
"""


def faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_large_blocks_are_used_again_without_page_faults():
    assert faults("give back") > 10_000  # 210 MB in pages of 4 KB; else this test shows nothing
    assert faults("keep") < 500
