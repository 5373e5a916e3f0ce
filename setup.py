"""Two import packages in one distribution: m3ae_kernels (torch and triton alone) and m3ae_fast (the engine)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "m3ae_fast/__init__.py").read_text()).group(1)

KERNELS = ["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy"]
TRAIN = [
    "deepspeed>=0.16",
    "pillow",
    "psutil",
    "pydantic>=2",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "torchvision",
    "webdataset",
]
TRANSFER = ["pyarrow", "scikit-learn", "timm>=1.0.15"]
DEV = ["matplotlib", "pytest", "pytest-benchmark", "ruff"]

setup(
    name="m3ae-fast",
    version=VERSION,
    description="Pre-training of multimodal masked autoencoders (M3AE), fast; with its kernels as a library",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["m3ae_fast*"]), *find_packages("kernels")],
    package_dir={"m3ae_kernels": "kernels/m3ae_kernels"},
    package_data={"m3ae_kernels": ["tuning/*.json"], "m3ae_fast": ["model/cpu/*.c"]},
    install_requires=KERNELS,
    extras_require={
        "train": TRAIN,
        "transfer": TRAIN + TRANSFER,
        "dev": TRAIN + TRANSFER + DEV,
        "flash": ["flash-attn"],
    },
)
