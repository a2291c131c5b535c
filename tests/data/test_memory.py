"""What is as large as it may be takes less than 1 GB beside what was there at the start."""

import subprocess
import sys

import pytest

CASES = {
    "an image of 50 million pixels, turned and transparent": """
        from PIL import Image
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGBA", (8160, 6125), (9, 90, 200, 99)).save("a.png", compress_level=1, exif=exif)
        """,
    "an image with a question as large": """
        from PIL import Image
        Image.new("RGB", (1200, 40000), (9, 90, 200)).save("a.png", compress_level=1)
        """,
    "a recording of 2^25 samples": """
        import numpy as np, soundfile
        soundfile.write("a.wav", np.sin(np.arange(2**25))[:, None] * [0.5, 0.25], 16_000)
        """,
    "a rate without a common divisor": """
        import numpy as np, soundfile
        soundfile.write("a.wav", np.sin(np.arange(2**22)), 383_999)
        """,
}
READ = """
import os, resource
import numpy as np
from coda_jax.data import audio, images

def read(name, header=""):
    if name.endswith(".png"):
        return images.patches(images.read_image(name, header), 2048)
    return audio.frames(audio.read_audio(name))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

images.patches(np.zeros((32, 32, 3), np.uint8), 4)
audio.frames(np.ones(16000, np.float32))
start = peak()
print(len(read(*[name for name in ("a.png", "a.wav") if os.path.exists(name)], *HEADER)))
print(peak() - start)
"""


@pytest.mark.all
@pytest.mark.parametrize("case", CASES)
def test_the_largest_inputs_take_less_than_a_gigabyte(tmp_path, case):
    """In a process of its own; the file is written by another."""
    lines = [line.strip() for line in CASES[case].strip().splitlines()]
    header = ["Who?"] if "question" in case else []
    for code in ("\n".join(lines), f"HEADER = {header}\n{READ}"):
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    length, gigabytes = found.stdout.split()
    assert int(length) > 0 and float(gigabytes) < 1
