"""Adds the C kernels to what pyproject.toml says. Without a compiler they are left out."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("vqkv/kernels/native")
SOURCES, HEADERS = (sorted(NATIVE.glob(f"[!.]*.{suffix}")) for suffix in "ch")


def sources_hash() -> str:
    """Of all C sources, as `vqkv.kernels.native.library` takes it to know a stale build."""
    content = b"".join(path.read_bytes() for path in sorted([*SOURCES, *HEADERS]))
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


setup(
    ext_modules=[
        Extension(
            "vqkv.kernels.native._native",
            sources=list(map(str, SOURCES)),
            depends=list(map(str, HEADERS)),
            # Nobody reads errno or flags of floats; keeping these would keep loops from vectors.
            extra_compile_args=[
                "-O3",
                "-std=c11",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
            ],
            define_macros=[
                ("Py_LIMITED_API", "0x030B0000"),
                ("VQKV_SOURCES", f'"{sources_hash()}"'),
            ],
            py_limited_api=True,
            optional=True,
        )
    ],
)
