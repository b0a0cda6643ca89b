"""Adds the C kernels to what pyproject.toml says. Without a compiler they are left out."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "vqkv.kernels.native._native",
            sources=["vqkv/kernels/native/nearest.c"],
            depends=["vqkv/kernels/native/nearest_impl.h"],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-ffp-contract=fast"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ],
)
