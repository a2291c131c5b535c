"""What this machine's processor is said to be able to do."""

import pytest

from coda_jax.nn import processors


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16_like\n", False),
        (None, False),  # as on other systems than Linux
    ],
)
def test_products_of_bfloat16_are_there_where_linux_lists_them(
    said, expected, monkeypatch, tmp_path
):
    file = tmp_path / "cpuinfo"
    if said is not None:
        file.write_text(said)
    monkeypatch.setattr(processors, "_CPU_INFO", file)
    assert processors.multiplies_bfloat16.__wrapped__() is expected
