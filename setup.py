"""What setup.cfg has no words for: the loops in C. Where they cannot be compiled bake does without, and is slower."""

import sys

from setuptools import Extension, setup

EXACT, FUSED = "-ffp-contract=off", "-ffp-contract=fast"  # products and sums rounded one by one, or together


def loops(name: str, contraction: str) -> Extension:
    """The module `bake.execute.NAME`."""
    return Extension(
        f"bake.execute.{name}",
        [f"bake/execute/{name}.c"],
        depends=["bake/execute/_elements.h", "bake/execute/_tile.h"],
        extra_compile_args=["/O2", "/std:c11"] if sys.platform == "win32" else ["-O3", contraction],
        optional=True,
    )


setup(ext_modules=[loops("_kernels", EXACT), loops("_products", FUSED)])
