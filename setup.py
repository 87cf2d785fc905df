"""What setup.cfg has no words for: the loops in C. Where they cannot be compiled bake does without, and is slower."""

import sys

from setuptools import Extension, setup

FLAGS = ["/O2", "/std:c11"] if sys.platform == "win32" else ["-O3", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension("bake.execute._kernels", ["bake/execute/_kernels.c"], extra_compile_args=FLAGS, optional=True)
    ]
)
