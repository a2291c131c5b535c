"""Installs coda_jax; `tasks/` and `gin_configs/` become packages of it."""

import pathlib
import re

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "coda_jax/__init__.py").read_text())[1]

GIN_FOLDERS = sorted(path.parent for path in (ROOT / "gin_configs").rglob("__init__.py"))
GIN_PACKAGES = [".".join(("coda_jax", *path.relative_to(ROOT).parts)) for path in GIN_FOLDERS]

INSTALL_REQUIRES = [
    "jax>=0.10.2,<0.11",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",  # optimizers and schedules
    "orbax-checkpoint>=0.12.8,<0.13",  # training checkpoints
    "tensorstore>=0.1.86,<0.2",  # the arrays of T5X checkpoints; orbax brings it
    "numpy>=2.4,<3",
    "safetensors>=0.8,<0.9",  # Hugging Face checkpoints and adapter files
    "jaxtyping>=0.3.11,<0.4",  # shapes in annotations
    "tqdm>=4.70,<5",  # progress bars
    "gin-config>=0.5,<0.6",  # configuration
    "seqio>=0.0.20,<0.1",  # tasks, vocabularies, metrics
    "tensorflow-datasets>=4.9.10,<5",  # data sets of seqio tasks
    "tensorflow>=2.21,<2.22",  # seqio's data pipelines
    "clu>=0.0.12,<0.1",  # logs for TensorBoard
    "tensorboard>=2.21,<2.22",  # without it TensorFlow cannot write them
    "matplotlib>=3.11,<4",  # pictures of the routing; fonts
    "pillow>=13,<14",  # images
    "scikit-learn>=1.9,<2",  # the demo's linear baseline; scans of digits
    "rouge-score>=0.1.2,<0.2",  # ROUGE, the metric of summaries
]
# The platforms for which py-nanotts has wheels.
NANOTTS_WHEELS = (
    "(sys_platform == 'linux' and platform_machine in 'x86_64 aarch64')"
    " or (sys_platform == 'win32' and platform_machine == 'AMD64')"
)
SPEECH = [
    "soundfile>=0.14,<0.15",  # reads WAV, FLAC and others
    "scipy>=1.17,<2",  # resampling; in tests the reference for the soft top-k
    "jiwer>=4,<5",  # word and character error rates
    f"py-nanotts>=0.1.1,<0.2; {NANOTTS_WHEELS}",  # voices of spoken digits
    "captcha>=0.7.1,<0.8",  # recordings of voices, also for other platforms' spoken digits
]
TEST = [
    *SPEECH,
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",  # two test files at a time
    "hypothesis>=6.170,<7",  # property tests
    "beartype>=0.23,<0.24",  # checks the jaxtyping annotations
]

# T5X itself is on no package registry: see docs/tpu.md.
T5X = [
    "fiddle>=0.3,<0.4",  # imported by T5X
    "cached_property>=2,<3",  # imported by T5X
    "grain>=0.2.18,<0.3",  # imported by T5X
    "chex>=0.1.92,<0.2",  # imported by T5X's own tests
]

setup(
    name="coda_jax",
    version=VERSION,
    description="Conditional Adapters (CoDA) for T5-family models in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "coda_jax",
        "coda_jax.bundled",
        "coda_jax.checkpoints",
        "coda_jax.demos",
        "coda_jax.tasks",
        *GIN_PACKAGES,
    ],
    package_dir={"coda_jax.tasks": "tasks", "coda_jax.gin_configs": "gin_configs"},
    package_data={
        "coda_jax.bundled": ["*/*", "*/*/*"],
        **{package: ["*.gin"] for package in GIN_PACKAGES},
    },
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "t5x": T5X,
        "speech": SPEECH,
        "test": TEST,
        "dev": [*TEST, "ruff==0.17.6", "wheel>=0.46"],
    },
    entry_points={"console_scripts": ["coda = coda_jax.cli:main"]},
)
