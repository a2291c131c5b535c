"""What this machine's processor is said to be able to do."""

import pytest

from coda_jax.nn import processors


@pytest.mark.parametrize(
    ("said", "bfloat16", "fast"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16\n", True, True),
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True, False),
        ("flags\t\t: fpu amx_bf16\n", True, False),
        ("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16_like\n", False, False),
        (None, False, False),  # as on other systems than Linux
    ],
)
def test_what_a_processor_does_well_is_what_linux_lists(
    said, bfloat16, fast, monkeypatch, tmp_path
):
    file = tmp_path / "cpuinfo"
    if said is not None:
        file.write_text(said)
    monkeypatch.setattr(processors, "_CPU_INFO", file)
    assert processors.multiplies_bfloat16.__wrapped__() is bfloat16
    assert processors.reads_matrices_fast.__wrapped__() is fast
