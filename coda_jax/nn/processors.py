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
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_flags())


@functools.cache
def reads_matrices_fast() -> bool:
    """Whether XLA's product of a few float32 rows reads its matrix as fast as one in blocks.

    It does, by an eighth faster, on a processor with AVX512-BF16 and without AMX; on one with AMX
    and on one with AVX2 alone it was slower.
    """
    return "avx512_bf16" in _flags() and "amx_bf16" not in _flags()


def _flags() -> list[str]:
    """The words of Linux's description of the processor."""
    return _CPU_INFO.read_text(encoding="utf-8").split() if _CPU_INFO.exists() else []
