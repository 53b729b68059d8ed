"""Builds the extension beside this file: python setup.py build_ext --inplace

With CUDA where this torch has it and nvcc is there (CUDA_HOME, or on PATH), else the CPU kernel
alone. nvcc compiles for the cards it finds; TORCH_CUDA_ARCH_LIST="8.0;9.0" names others.
"""

import os
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

NAME = "fused_rejection_C"
BINDINGS = ["fused_rejection.cpp", "from_logits.cpp", "decoder_layer.cpp", "decoding_round.cpp"]
KERNELS = [
    "fused_rejection_kernel.cu",
    "from_logits_kernel.cu",
    "floor_kernel.cu",
    "decoder_layer_kernel.cu",
    "decoding_round_kernel.cu",
]
EVERY_ARCHITECTURE = "8.0;8.6;9.0;12.0+PTX"
# No contraction of a * b + c: tokens are bit-identical on every machine.
CXX_FLAGS = (
    ["/O2", "/std:c++20", "/fp:precise", "/Zc:preprocessor"]
    if sys.platform == "win32"
    else ["-O3", "-std=c++20", "-ffp-contract=off"]
)
# The exponentials are written with fused multiply-adds, which baseline x86-64 only has in libm.
if Path("/proc/cpuinfo").exists() and {"fma", "avx2"} <= set(
    Path("/proc/cpuinfo").read_text().split()
):
    CXX_FLAGS += ["-mfma", "-mavx2"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false", "-lineinfo"]


def extension():
    nvcc = CUDA_HOME and any(Path(CUDA_HOME, "bin").glob("nvcc*"))
    if torch.version.cuda is None or not nvcc:
        if torch.version.cuda is not None:
            print(
                f"torch has CUDA {torch.version.cuda} but nvcc was not found: building the CPU "
                "kernel alone; install the CUDA toolkit, set CUDA_HOME to it and run this again",
                file=sys.stderr,
            )
        return CppExtension(NAME, BINDINGS, extra_compile_args=CXX_FLAGS)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", EVERY_ARCHITECTURE)
    return CUDAExtension(
        NAME,
        BINDINGS + KERNELS,
        define_macros=[("WITH_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


setup(name=NAME, ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
