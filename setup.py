"""Package map: each top-level folder is a sub-package of the `mirage_hello` namespace."""

from setuptools import setup

FOLDERS = ("kernels", "ptx", "reference", "model", "bench", "tools")
SUBFOLDERS = (
    "kernels/triton",
    "kernels/cupy",
    "kernels/numba",
    "kernels/cuda",
    "ptx/emulator",
    "model/data",
    "model/training",
    "bench/sweeps",
)


def package(folder: str) -> str:
    return "mirage_hello." + folder.replace("/", ".")


setup(
    packages=[package(folder) for folder in FOLDERS + SUBFOLDERS],
    package_dir={package(folder): folder for folder in FOLDERS + SUBFOLDERS},
    package_data={
        package("ptx"): ["*.ptx", "*.j2"],
        package("ptx/emulator"): ["*.lark"],
        package("kernels"): ["choices/*.json"],
        package("kernels/cuda"): ["*.cu", "*.cuh"],
        package("model"): ["weights/*.safetensors", "weights/*.json", "weights/*.md"],
        package("tools"): ["*.html", "*.css", "*.js", "*.j2"],
    },
)
