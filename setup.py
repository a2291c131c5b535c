"""Installs coda_jax. `coda_jax/tasks` and `coda_jax/gin_configs` are links to folders beside it."""

import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent


def text(file: str) -> str:
    """What a text file holds."""
    return (ROOT / file).read_text(encoding="utf-8")


VERSION = re.search(r'__version__ = "(.+)"', text("coda_jax/__init__.py"))[1]


def requirements(file: str) -> list[str]:
    """The lines of a requirements file, without comments."""
    lines = (line.split("#")[0].strip() for line in text(file).splitlines())
    return [line for line in lines if line]


INSTALL_REQUIRES = [
    *requirements("requirements-light.txt"),
    "seqio>=0.0.20,<0.1",  # tasks, vocabularies, metrics
    "tensorflow>=2.21,<2.22",  # seqio's data pipelines
    "tensorflow-datasets>=4.9.10,<5",  # data sets of seqio tasks
    "importlib_resources>=6,<8",  # which it imports to prepare one, and does not ask for
    "clu>=0.0.12,<0.1",  # logs for TensorBoard
    "tensorboard>=2.21,<2.22",  # without it TensorFlow cannot write them
    "rouge-score>=0.1.2,<0.2",  # ROUGE, the metric of summaries
    "scikit-learn>=1.9,<2",  # F1 and Matthews' correlation, metrics of GLUE
    "scipy>=1.17,<2",  # correlations of scores, metrics of GLUE
]
# The platforms for which py-nanotts has wheels.
NANOTTS_WHEELS = (
    "(sys_platform == 'linux' and platform_machine in 'x86_64 aarch64')"
    " or (sys_platform == 'win32' and platform_machine == 'AMD64')"
)
SPEECH = [
    "soundfile>=0.14,<0.15",  # reads WAV, FLAC and others
    "scipy>=1.17,<2",  # resampling; in tests a reference
    "jiwer>=4,<5",  # word and character error rates
    f"py-nanotts>=0.1.1,<0.2; {NANOTTS_WHEELS}",  # voices of spoken digits
    "captcha>=0.7.1,<0.8",  # recordings of voices, also for other platforms' spoken digits
]
IMAGES = [
    "pillow>=13,<14",  # image files; headers with questions
    "matplotlib>=3.11,<4",  # fonts of headers and of printed letters; pictures of the routing
    "scikit-learn>=1.9,<2",  # scans of digits; linear classifiers to compare with
]
SERVE = [
    "starlette>=1.10,<2",  # routes and responses
    "uvicorn>=0.54,<0.55",  # HTTP itself
    "prometheus-client>=0.26,<0.27",  # what /metrics says
]
# T5X itself is on no package registry: see docs/t5x.md.
T5X = [
    "fiddle>=0.3,<0.4",  # imported by T5X
    "cached_property>=2,<3",  # imported by T5X
    "grain>=0.2.18,<0.3",  # imported by airio, which T5X imports
    "chex>=0.1.92,<0.2",  # imported by T5X's own tests
]
TEST = [
    *SPEECH,
    *IMAGES,
    *SERVE,
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",  # two test files at a time
    "hypothesis>=6.170,<7",  # property tests
    "beartype>=0.23,<0.24",  # checks the jaxtyping annotations
    "setuptools>=77",  # builds the package in its own tests
]


class FreshBuild(build_py):
    """Starts from nothing: what an earlier build has left in `build/` does not come along."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    name="coda_jax",
    version=VERSION,
    description="Conditional Adapters (CoDA) for T5-family models in JAX and Flax",
    long_description=text("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["coda_jax", "coda_jax.*"]),  # it follows links
    package_data={
        "": ["*.gin"],
        "coda_jax.bundled": ["stdlib_vocabulary/*"],
        "coda_jax.profiling": ["*.html"],
    },
    include_package_data=False,  # the checkpoints in bundled/ are for clones
    cmdclass={"build_py": FreshBuild},
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "speech": SPEECH,
        "images": IMAGES,
        "serve": SERVE,
        "t5x": T5X,
        "all": [*SPEECH, *IMAGES, *SERVE, *T5X],
        "cuda": ["jax[cuda12]"],  # jax's own choice; jax[cuda13] is for drivers from 580 on
        "tpu": ["jax[tpu]", "libtpu"],  # libtpu also compiles for TPUs that are not there
        "test": TEST,
        "dev": [*TEST, "ruff==0.17.6"],
    },
    entry_points={"console_scripts": ["coda = coda_jax.cli:main"]},
)
