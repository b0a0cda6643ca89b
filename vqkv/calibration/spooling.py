"""Running a model over windows and spooling what compressors learn from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from vqkv.calibration.capture import Kind, StateCapture
from vqkv.calibration.source import gradients_of
from vqkv.calibration.spool import Spool
from vqkv.compressor import KVCompressor

#: Called with a phase, what of it is done, and of what: `"capture"`, in tokens; `"learn"`, in
#: streams; `"distil"`, in steps.
Progress = Callable[[str, int, int], None]


def wanted_kinds(compressor: KVCompressor) -> dict[int, list[Kind]]:
    """What a compressor learns from, by layer: keys and queries before or after RoPE, values.

    A stream that learns nothing itself is wanted where one that does is predicted from it.
    """
    codecs = dict(compressor.codecs())
    wanted = {key for key, codec in codecs.items() if not codec.config.data_free}
    for key in reversed(codecs):  # sources come before what is predicted from them
        if key in wanted:
            wanted.update(compressor.sources(*key))
    wants: dict[int, list[Kind]] = {}
    for (layer, stream), codec in codecs.items():
        if (layer, stream) not in wanted:
            continue
        pre = stream == "keys" and codec.layout.rope == "pre"
        wants.setdefault(layer, []).append("pre_keys" if pre else stream)
        if codec.config.data_free:
            continue
        if codec.metric == "query":
            wants[layer].append("pre_queries" if pre else "queries")
        if codec.metric == "fisher" or compressor.scheme.calibration.weights == "fisher":
            wants[layer].append(gradients_of(stream, pre))
    return wants


def wanted_by_all(compressors: Iterable[KVCompressor]) -> dict[int, list[Kind]]:
    """What several compressors learn from, each kind once."""
    wants: dict[int, list[Kind]] = {}
    for compressor in compressors:
        for layer, kinds in wanted_kinds(compressor).items():
            held = wants.setdefault(layer, [])
            held.extend(kind for kind in kinds if kind not in held)
    return wants


def capture(
    model: PreTrainedModel,
    wants: Mapping[int, Collection[Kind]],
    windows: Sequence[torch.Tensor],
    spool: Spool,
    progress: Progress | None = None,
) -> None:
    """Run the model on the windows that the spool does not hold yet.

    Raises:
        ModelError: the model cannot be captured.
        StateError: NaN or infinity in the states; names layer, kind and window.
    """
    total = sum(len(window) for window in windows)
    done = sum(len(window) for window in windows[: spool.windows])
    if progress is not None:
        progress("capture", done, total)
    if done == total:
        return

    def take(layer: int, kind: Kind, states: torch.Tensor) -> None:
        if kind in ("queries", "pre_queries"):
            spool.add_queries(layer, kind, states)
        else:
            spool.append(layer, kind, states)

    with StateCapture(model, wants, take) as running:
        for window in windows[spool.windows :]:
            running.run(window)
            spool.finish_window()
            done += len(window)
            if progress is not None:
                progress("capture", done, total)
