"""Builds the extension beside this file: python setup.py build_ext --inplace"""

import sys

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# No contraction of a * b + c: tokens are bit-identical on every machine.
FLAGS = (
    ["/O2", "/std:c++20", "/fp:precise"]
    if sys.platform == "win32"
    else ["-O3", "-std=c++20", "-ffp-contract=off"]
)

setup(
    name="fused_rejection_C",
    ext_modules=[
        CppExtension("fused_rejection_C", ["fused_rejection.cpp"], extra_compile_args=FLAGS)
    ],
    cmdclass={"build_ext": BuildExtension},
)
