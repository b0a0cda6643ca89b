"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "vqkv" / "kernels" / "native"
DRIVER = Path(__file__).parent / "sanitized" / "driver.c"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver and all kernels, built with sanitizers."""
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    trial = subprocess.run([compiler, *SANITIZE, empty, "-o", folder / "empty"])
    if trial.returncode or subprocess.run([folder / "empty"]).returncode:
        pytest.skip(f"{compiler} has no sanitizers, or they do not run here")
    # module.c is what makes an extension module of the others, and needs Python's headers.
    kernels = [source for source in sorted(NATIVE.glob("*.c")) if source.name != "module.c"]
    built = folder / "driver"
    # Without optimization the build is three times shorter; -g makes reports name lines.
    flags = ["-O0", "-g", "-std=c11", "-ffp-contract=fast", f"-I{NATIVE}", *SANITIZE]
    subprocess.run([compiler, *flags, *kernels, DRIVER, "-lm", "-o", built], check=True)
    return built


def test_kernels_stay_inside_of_memory(driver: Path) -> None:
    run = subprocess.run([driver], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
