"""Two import packages in one distribution: m3ae_kernels (which requires only torch and Triton) and m3ae_fast (the
engine)."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["m3ae_fast*"]), "m3ae_fast.configs", *find_packages("kernels")],
    package_dir={"m3ae_kernels": "kernels/m3ae_kernels", "m3ae_fast.configs": "configs"},
    package_data={"m3ae_fast.configs": ["*.json"], "m3ae_kernels": ["tuning/*.json", "cpu/*.c", "cpu/*.h"]},
)
