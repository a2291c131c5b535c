"""What the processor of this machine can do."""

import functools
import pathlib

_CPU_INFO = pathlib.Path("/proc/cpuinfo")


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16, with float32 results (AMX or AVX512-BF16).

    XLA uses them where a product names float32 as its result's type. A CPU without them rounds
    less often, and is faster, where the result is bfloat16. Asked when a program is traced: an
    exported one is for a CPU such as the one that exported it.
    """
    if not _CPU_INFO.exists():
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_CPU_INFO.read_text(encoding="utf-8").split())
