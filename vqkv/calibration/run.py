"""Calibration: from a model and some texts to an artefact, resumable and in bounded memory."""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqkv.artefact import FILES, base_model_name
from vqkv.calibration.distillation import Distillation
from vqkv.calibration.partial import StreamFiles, distilled_file, resume, working
from vqkv.calibration.source import CapturedStates
from vqkv.calibration.spool import Spool
from vqkv.calibration.spooling import Progress, capture, wanted_kinds
from vqkv.calibration.windows import Text, calibration_windows, check_context, read_text
from vqkv.codebooks import LEARNERS
from vqkv.compressor import KVCompressor, Provenance
from vqkv.errors import StateError
from vqkv.folders import check_free
from vqkv.geometry import Geometry
from vqkv.scheme import Scheme, learners_of
from vqkv.version import __version__


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration made, and what it took.

    Attributes:
        compressor: as saved.
        folder: of the artefact.
        seconds_capture: running the model, in this process; a resumed calibration had less to do.
        seconds_learn: fitting transforms and codebooks, and distillation, likewise.
        peak_rss_bytes: of the process since it started, the model included.
    """

    compressor: KVCompressor
    folder: Path
    seconds_capture: float
    seconds_learn: float
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "out": str(self.folder),
            "seconds_capture": self.seconds_capture,
            "seconds_learn": self.seconds_learn,
            "peak_rss_bytes": self.peak_rss_bytes,
            "side_bytes": self.compressor.nbytes(),
            "bits_per_value": self.compressor.bits_per_value,
            "health": self.compressor.health(),
        }


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    texts: Sequence[str | Path | Text],
    *,
    tokens: int,
    out: str | Path,
    seed: int = 0,
    context: int = 2048,
    overwrite: bool = False,
    captured: Spool | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Fit a scheme to a model on some texts and save the artefact.

    Work in progress lies in `<out>.partial`. Interrupted, by a kill too, the next call with the
    same model, scheme, texts and numbers goes on with it and ends with the same artefact, bit for
    bit. `out` appears whole, at the end. A data-free scheme is saved without any of this.

    Args:
        model: that the artefact is for.
        tokenizer: the model's.
        scheme: what to fit.
        texts: texts, or paths of text files; each gives an equal share of the tokens.
        tokens: that the model runs on. Those that residency keeps exact at the start of each
            window are not learned from.
        out: folder of the artefact.
        seed: all randomness follows from it.
        context: tokens of a window.
        overwrite: replace an artefact that is at `out`.
        captured: states of these very windows, of every kind that the scheme learns from, where
            several schemes learn from the same ones: the model runs for distillation alone. It
            stays as it is.
        progress: told how far it is.

    Raises:
        ArtefactError: `out` exists, another calibration is writing it, or the disk is full.
        TextError: a text is missing, unreadable or too short.
        ModelError: the model cannot be captured, or has no room for `context` tokens.
        SchemeError: the scheme does not fit the model.
        StateError: NaN or infinity in the states, or too few tokens; names the stream. Or
            `captured` holds other windows or sinks.
        KernelError: a learner cannot run here, as without a library that it needs.
    """
    out = Path(out)
    check_free(out, FILES, overwrite=overwrite)
    geometry = Geometry.from_model(model)
    check_context(model.config, context)
    read = [text if isinstance(text, Text) else read_text(text) for text in texts]
    base_model = base_model_name(model.config)
    run = {"tokens": tokens, "context": context, "seed": seed}
    sources = {"texts": [t.name for t in read], "text_sha256": [t.sha256 for t in read]}
    compressor = KVCompressor(
        scheme, geometry, Provenance(base_model, {} if scheme.data_free else {**run, **sources})
    )
    _check_learners(compressor)
    windows = calibration_windows(tokenizer, read, tokens, context)
    manifest = {
        "library_version": __version__,
        "fingerprint": scheme.fingerprint(),
        "geometry": geometry.to_dict(),
        "base_model": base_model,
        "model_sample": model_sample(model),
        "window_sha256": _window_hash(windows),
        **run,
        **sources,
    }
    capture_seconds = learn_seconds = 0.0
    place = out.resolve()  # "." has no name
    partial = place.with_name(f"{place.name}.partial")
    with working(partial):
        if not scheme.data_free:
            spool = resume(partial, manifest, scheme.residency.sinks)
            start = time.perf_counter()
            if captured is None:
                capture(model, wanted_kinds(compressor), windows, spool, progress)
            else:
                spool = _checked(captured, windows, scheme.residency.sinks)
            middle = time.perf_counter()
            source = CapturedStates(spool, model, compressor, context)
            _learn(compressor, source, partial, seed, progress)
            if scheme.calibration.distillation is not None:
                compressor = Distillation(
                    model, compressor, windows, distilled_file(partial), seed
                ).run(progress)
            capture_seconds, learn_seconds = middle - start, time.perf_counter() - middle
        compressor.save_pretrained(out, overwrite=overwrite)
        shutil.rmtree(partial)
    return CalibrationReport(compressor, out, capture_seconds, learn_seconds, peak_rss_bytes())


def peak_rss_bytes() -> int:
    """The most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _check_learners(compressor: KVCompressor) -> None:
    """Find out now what would otherwise end the work after the model has run."""
    device = torch.device("cpu")  # where spooled states are
    for _, codec in compressor.codecs():
        for segment in codec.config.all_segments:
            for learner in learners_of(segment.quantizer):
                LEARNERS.build(learner).check_runs(device)


def model_sample(model: PreTrainedModel) -> str:
    """SHA-256 of a few values of every weight, which tells apart models of one name."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _window_hash(windows: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{len(window)}:".encode() + window.numpy().tobytes())
    return digest.hexdigest()


def _checked(captured: Spool, windows: Sequence[torch.Tensor], sinks: int) -> Spool:
    tokens = sum(max(0, len(window) - sinks) for window in windows)
    expected, found = (len(windows), tokens), (captured.windows, captured.tokens)
    if expected != found or captured.sinks != sinks:
        raise StateError(
            f"{captured.folder}: there are {found[1]} tokens of {found[0]} windows without their "
            f"first {captured.sinks}; needed are {expected[1]} of {expected[0]} without {sinks}"
        )
    return captured


def _learn(
    compressor: KVCompressor,
    source: CapturedStates,
    partial: Path,
    seed: int,
    progress: Progress | None,
) -> None:
    if progress is not None:
        progress("learn", 0, sum(not codec.config.data_free for _, codec in compressor.codecs()))

    def tell(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress("learn", done, total)

    compressor.fit(source, seed=seed, progress=tell, checkpoint=StreamFiles(partial))
