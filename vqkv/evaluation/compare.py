"""Many schemes on one axis: each calibrated once, scored on the same tokens of the same texts.

Calibrations and scores are kept in the user's cache folder by what they depend on, so a comparison
that was interrupted, or that one more scheme joins, goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqkv.calibration import (
    Spool,
    Text,
    calibrate,
    calibration_windows,
    capture,
    read_text,
    text_windows,
    wanted_by_all,
)
from vqkv.calibration.run import model_sample
from vqkv.compressor import KVCompressor, StreamKey
from vqkv.errors import REFUSALS
from vqkv.evaluation.exact import ExactLogits
from vqkv.evaluation.run import evaluate
from vqkv.folders import write_whole
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
        seconds_learn: after the states were captured; None where nothing is learned.
        encode_us: microseconds to code one token in all layers; `decode_us` to reconstruct it.
    """

    evaluation: dict[str, Any]
    seconds_learn: float | None
    encode_us: float
    decode_us: float


@dataclass(frozen=True)
class Settings:
    """What all rows of a comparison have in common.

    Attributes:
        calibration_texts: each gives an equal share of `calibration_tokens`.
        tokens: scored per text, after `skip`, in windows of `context`.
        passages: repeated passages of each length, of the first text alone.
        passage_lengths: in tokens; longer ones would take most of a comparison's time.
        sinks: kept exact, whatever a scheme says.
    """

    calibration_texts: tuple[Path, ...]
    calibration_tokens: int = 32768
    tokens: int = 16384
    skip: int = 4096
    context: int = 2048
    passages: int = 8
    passage_lengths: tuple[int, ...] = (512, 1024)
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
    read = texts_to_score(tokenizer, texts, settings)
    with open_bench(model, tokenizer, schemes, settings, progress) as bench:
        for scheme in schemes:
            yield from bench.rows(scheme, read)


def texts_to_score(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Path], settings: Settings
) -> list[Text]:
    """Texts, all long enough, which is better known now than after the first fit.

    Raises:
        TextError: one is too short or cannot be read.
    """
    read = [read_text(text) for text in texts]
    for text in read:
        text_windows(tokenizer, text, settings.tokens, settings.context, settings.skip)
    return read


@contextmanager
def open_bench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    schemes: Sequence[Scheme],
    settings: Settings,
    progress: Progress | None = None,
) -> Iterator[Bench]:
    """A bench for schemes that learn from what some of `schemes` learn from.

    Captured states go when the block ends; where it ends by an exception they stay, so that the
    next bench for the same schemes goes on with them.
    """
    folder = cache_root() / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda phase, done, total: None)
    # In a folder of its own, as files are named by tokens alone: another model must not find them.
    with _scratch(folder) as logits:
        exact = ExactLogits(model, logits)
        bench = Bench(model, tokenizer, schemes, settings, exact, folder, tell)
        yield bench
        shutil.rmtree(bench.states, ignore_errors=True)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new folder for exact logits, gone when the block ends.

    Those that killed processes have left go first: they take gigabytes.
    """
    for left in folder.glob("exact-*/"):
        with suppress(OSError), _alone(left):  # that of others, or in use
            shutil.rmtree(left)
    new = folder / f"exact-{uuid4().hex}"
    with _alone(new):  # locked before it is there, so never taken for left
        new.mkdir()
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder that nobody else is at work in. Raises OSError where somebody is."""
    lock = folder.with_suffix(".lock")
    with FileLock(lock, timeout=0):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class Bench:
    """What the schemes of one comparison share: a model, its states, its exact logits.

    Made by `open_bench`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        schemes: Sequence[Scheme],
        settings: Settings,
        exact: ExactLogits,
        folder: Path,
        tell: Progress,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.exact = exact
        self.folder = folder
        self.tell = tell
        self.geometry = Geometry.from_model(model)
        self._learned = [scheme for scheme in schemes if not scheme.data_free]
        self._common = {
            "code": _code_hash(),
            "model": model_sample(model),
            "device": model.device.type,
            "calibration_tokens": settings.calibration_tokens,
            "calibration_texts": [read_text(t).sha256 for t in settings.calibration_texts],
            "context": settings.context,
            "seed": settings.seed,
        }
        wanted = sorted(scheme.fingerprint() for scheme in self._learned)
        #: Where captured states lie, by what they are of; interrupted, they are gone on with.
        self.states = folder / f"states-{_hash({**self._common, 'schemes': wanted})}"

    def rows(self, scheme: Scheme, texts: Sequence[Text]) -> Iterator[Row]:
        """Of one scheme on every text, from the cache where they are there."""
        home = self.home(scheme)
        compressor: KVCompressor | None = None
        for index, text in enumerate(texts):
            wanted = {
                "text": text.sha256,
                "tokens": self.settings.tokens,
                "skip": self.settings.skip,
                "passages": 0 if index else self.settings.passages,
                "passage_lengths": self.settings.passage_lengths,
                "sinks": self.settings.sinks,
            }
            kept = home / f"{Path(text.name).stem}-{_hash(wanted)}.json"
            if not kept.exists():
                if compressor is None:
                    compressor = self.calibrated(scheme)
                    compressor = compressor.with_residency(sinks=self.settings.sinks)
                evaluation = evaluate(
                    self.model,
                    self.tokenizer,
                    compressor,
                    text,
                    tokens=self.settings.tokens,
                    context=self.settings.context,
                    skip=self.settings.skip,
                    passages=0 if index else self.settings.passages,
                    passage_lengths=self.settings.passage_lengths,
                    exact=self.exact,
                    progress=_named(self.tell, f"{scheme.name}: {text.name}"),
                )
                keep(kept, evaluation.to_dict())
            times = home / "coding.json"
            if not times.exists():
                compressor = compressor or self.calibrated(scheme)
                encode_us, decode_us = coding_times(compressor)
                keep(times, {"encode_us": encode_us, "decode_us": decode_us})
            took = home / "learning.json"
            seconds = _kept(took)["seconds"] if took.exists() else None
            yield Row(_kept(kept), seconds, **_kept(times))

    def home(self, scheme: Scheme) -> Path:
        """Where everything about a scheme is kept."""
        common = {**self._common, "fingerprint": scheme.fingerprint()}
        return self.folder / f"{scheme.name}-{_hash(common)}"

    def calibrated(self, scheme: Scheme) -> KVCompressor:
        """The scheme's compressor, from the cache where it is there."""
        if scheme.data_free:
            return KVCompressor(scheme, self.geometry)
        home = self.home(scheme)
        artefact, took = home / "artefact", home / "learning.json"
        if artefact.exists() and took.exists():
            return KVCompressor.from_pretrained(artefact, self.model.config)
        home.mkdir(parents=True, exist_ok=True)
        try:
            report = calibrate(
                self.model,
                self.tokenizer,
                scheme,
                self.settings.calibration_texts,
                tokens=self.settings.calibration_tokens,
                out=artefact,
                seed=self.settings.seed,
                context=self.settings.context,
                overwrite=True,
                captured=self.captured(scheme.residency.sinks),
                progress=_named(self.tell, scheme.name),
            )
        except REFUSALS:
            with suppress(OSError):  # not empty
                home.rmdir()
            raise
        keep(took, {"seconds": report.seconds_learn})
        return report.compressor

    def captured(self, sinks: int) -> Spool:
        """The states that all schemes with so many sinks learn from, captured once."""
        texts = [read_text(text) for text in self.settings.calibration_texts]
        windows = calibration_windows(
            self.tokenizer, texts, self.settings.calibration_tokens, self.settings.context
        )
        spool = Spool(self.states / f"sinks-{sinks}", sinks)
        wants = wanted_by_all(
            KVCompressor(scheme, self.geometry)
            for scheme in self._learned
            if scheme.residency.sinks == sinks
        )
        try:
            capture(self.model, wants, windows, spool, _named(self.tell, "all schemes"))
        except REFUSALS:
            if not spool.windows:
                shutil.rmtree(self.states)
            raise
        return spool


def coding_times(compressor: KVCompressor) -> tuple[float, float]:
    """As `timed`, of all streams of a compressor."""

    def once(x: torch.Tensor) -> Iterator[tuple[float, float]]:
        decoded: dict[StreamKey, torch.Tensor] = {}
        for (layer, stream), _codec in compressor.codecs():
            sources = [decoded[key] for key in compressor.sources(layer, stream)]
            start = time.perf_counter()
            encoded = compressor.encode(layer, stream, x, sources)
            middle = time.perf_counter()
            back = compressor.decode(layer, stream, encoded, sources=sources)
            yield middle - start, time.perf_counter() - middle
            if compressor.last_use(layer, stream) is not None:
                decoded[layer, stream] = back

    return timed(once, compressor.geometry)


@torch.inference_mode()
def timed(
    once: Callable[[torch.Tensor], Iterable[tuple[float, float]]], geometry: Geometry
) -> tuple[float, float]:
    """Microseconds a token to encode and to decode all streams of random states, best of three.

    `once` codes states `[1, H, T, D]` in every stream and gives the seconds of both for each.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, geometry.kv_heads, TIMED_TOKENS, geometry.head_dim)
    x = torch.randn(shape, generator=generator)
    runs = [[sum(seconds) for seconds in zip(*once(x), strict=True)] for _ in range(3)]
    encode, decode = (1e6 * min(seconds) / TIMED_TOKENS for seconds in zip(*runs, strict=True))
    return encode, decode


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


def _kept(path: Path) -> dict[str, Any]:
    """JSON as it was written, so that figures are the same whether they were kept or are new."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def keep(path: Path, values: dict[str, Any]) -> None:
    """Write JSON, all or nothing."""
    write_whole(path, json.dumps(values, indent=2, allow_nan=False))
