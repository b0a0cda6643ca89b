"""Many schemes on one axis: each calibrated once, scored on the same tokens of the same texts.

Calibrations and scores are kept in the user's cache folder by what they depend on, so a comparison
that was interrupted, or that one more scheme joins, goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqkv.artefact import base_model_name
from vqkv.calibration import Text, calibrate, read_text
from vqkv.calibration.run import model_sample
from vqkv.compressor import KVCompressor, StreamKey
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.run import Evaluation, evaluate
from vqkv.geometry import Geometry
from vqkv.models import cache_root
from vqkv.scheme import Scheme
from vqkv.version import __version__

#: Called with what is being done, how much of it, and of what.
Progress = Callable[[str, int, int], None]

#: Tokens that coding is timed on.
TIMED_TOKENS = 512


@dataclass(frozen=True)
class Row:
    """One scheme on one text.

    Attributes:
        evaluation: as `vqkv evaluate` gives it.
        seconds_calibration: capture and learning; None where nothing is learned.
        encode_us: microseconds to code one token in all layers; `decode_us` to reconstruct it.
    """

    evaluation: dict[str, Any]
    seconds_calibration: float | None
    encode_us: float
    decode_us: float


@dataclass(frozen=True)
class Settings:
    """What all rows of a comparison have in common.

    Attributes:
        calibration_texts: each gives an equal share of `calibration_tokens`.
        tokens: scored per text, after `skip`, in windows of `context`.
        passages: repeated passages of each length.
        sinks: kept exact, whatever a scheme says.
    """

    calibration_texts: tuple[Path, ...]
    calibration_tokens: int = 32768
    tokens: int = 16384
    skip: int = 4096
    context: int = 2048
    passages: int = 8
    sinks: int = 4
    seed: int = 0


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    schemes: Sequence[Scheme],
    texts: Sequence[str | Path],
    settings: Settings,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Every scheme on every text, before use, as each row is done.

    Raises:
        TextError: a text cannot be read or is too short.
        SchemeError, StateError: a scheme does not fit the model or its states.
    """
    tell = progress or (lambda phase, done, total: None)
    folder = cache_root() / "compare"
    read = [read_text(text) for text in texts]
    folder.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, as files are named by tokens alone: another model must not find them.
    logits = Path(tempfile.mkdtemp(prefix="exact-", dir=folder))
    try:
        yield from _rows(
            model, tokenizer, schemes, read, settings, ExactLogits(model, logits), tell
        )
    finally:
        shutil.rmtree(logits, ignore_errors=True)


def _rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    schemes: Sequence[Scheme],
    texts: Sequence[Text],
    settings: Settings,
    exact: ExactLogits,
    tell: Progress,
) -> Iterator[Row]:
    folder, sample = cache_root() / "compare", model_sample(model)
    for scheme in schemes:
        common = {
            "code": _code_hash(),
            "fingerprint": scheme.fingerprint(),
            "model": sample,
            "calibration_tokens": settings.calibration_tokens,
            "calibration_texts": [read_text(t).sha256 for t in settings.calibration_texts],
            "context": settings.context,
            "seed": settings.seed,
        }
        home = folder / f"{scheme.name}-{_hash(common)}"
        compressor: KVCompressor | None = None
        seconds: float | None = None
        for text in texts:
            wanted = {
                "text": text.sha256,
                "tokens": settings.tokens,
                "skip": settings.skip,
                "passages": settings.passages,
                "sinks": settings.sinks,
            }
            kept = home / f"{Path(text.name).stem}-{_hash(wanted)}.json"
            if kept.exists():
                yield Row(**json.loads(kept.read_text(encoding="utf-8")))
                continue
            if compressor is None:
                compressor, seconds = _calibrated(
                    model, tokenizer, scheme, settings, home, _named(tell, scheme.name)
                )
                compressor = compressor.with_residency(sinks=settings.sinks)
            evaluation: Evaluation = evaluate(
                model,
                tokenizer,
                compressor,
                text,
                tokens=settings.tokens,
                context=settings.context,
                skip=settings.skip,
                passages=settings.passages,
                exact=exact,
                progress=_named(tell, f"{scheme.name}: {text.name}"),
            )
            encode_us, decode_us = coding_times(compressor)
            row = Row(evaluation.to_dict(), seconds, encode_us, decode_us)
            _keep(kept, asdict(row))
            # As it will come back from the file.
            yield Row(**json.loads(kept.read_text(encoding="utf-8")))


def provenance() -> dict[str, str]:
    """What coding times depend on: machine and versions."""
    found = {name: version(name) for name in ("torch", "transformers")}
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_cpu_name()}"
    return {"vqkv": __version__, "python": platform.python_version(), **found, "machine": machine}


def _cpu_name() -> str:
    """As the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@torch.inference_mode()
def coding_times(compressor: KVCompressor) -> tuple[float, float]:
    """Microseconds a token to encode and to decode all streams of random states, best of three."""
    geometry = compressor.geometry
    generator = torch.Generator().manual_seed(0)
    shape = (1, geometry.kv_heads, TIMED_TOKENS, geometry.head_dim)
    x = torch.randn(shape, generator=generator)
    best = [float("inf"), float("inf")]
    for _ in range(3):
        spent = [0.0, 0.0]
        decoded: dict[StreamKey, torch.Tensor] = {}
        for (layer, stream), _codec in compressor.codecs():
            sources = [decoded[key] for key in compressor.sources(layer, stream)]
            start = time.perf_counter()
            encoded = compressor.encode(layer, stream, x, sources)
            middle = time.perf_counter()
            back = compressor.decode(layer, stream, encoded, sources=sources)
            spent[0] += middle - start
            spent[1] += time.perf_counter() - middle
            if compressor.last_use(layer, stream) is not None:
                decoded[layer, stream] = back
        best = [min(pair) for pair in zip(best, spent, strict=True)]
    encode, decode = (1e6 * seconds / TIMED_TOKENS for seconds in best)
    return encode, decode


def _calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    settings: Settings,
    home: Path,
    progress: Progress,
) -> tuple[KVCompressor, float | None]:
    """The scheme's compressor, from the cache where it is there."""
    if scheme.data_free:
        return KVCompressor(scheme, Geometry.from_model(model)), None
    artefact, took = home / "artefact", home / "calibration.json"
    if artefact.exists() and took.exists():
        seconds = float(json.loads(took.read_text(encoding="utf-8"))["seconds"])
        return KVCompressor.from_pretrained(artefact, model.config), seconds
    home.mkdir(parents=True, exist_ok=True)
    report = calibrate(
        model,
        tokenizer,
        scheme,
        settings.calibration_texts,
        tokens=settings.calibration_tokens,
        out=artefact,
        seed=settings.seed,
        context=settings.context,
        overwrite=True,
        progress=progress,
    )
    seconds = report.seconds_capture + report.seconds_learn
    _keep(took, {"seconds": seconds, "model": base_model_name(model.config)})
    return report.compressor, seconds


def _named(tell: Progress, name: str) -> Progress:
    return lambda phase, done, total: tell(f"{name}: {phase}", done, total)


@cache
def _code_hash() -> str:
    """Of the package's own sources: what others gave is not what these would."""
    digest = hashlib.sha256(__version__.encode())
    root = Path(__file__).parent.parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.[ch]")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _hash(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _keep(path: Path, values: dict[str, Any]) -> None:
    """Write JSON, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(json.dumps(values, indent=2, allow_nan=False), encoding="utf-8")
    os.replace(draft, path)
