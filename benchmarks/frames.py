"""What it costs to turn keys within frames of tokens before they are coded.

    python benchmarks/frames.py --out benchmarks/results/frames.json

Keys that are turned by their offset in a frame need no turn of their own when they are read: all
of a frame are turned alike, which queries can be instead. For every few layers of the demo model,
the cost of errors of keys in groups of whole pairs (`pair_metric`, 2 bits a value), turned back to
where they were, in the loss's Fisher information by keys before RoPE, as a multiple of what those
cost; on windows that were not fitted on. Frames are of all RoPE pairs, of all but the fastest, or
of all with means taken off before they are turned, whose scores would then depend on positions
alone. Apart means that no group has both pairs that are turned and pairs that are not.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vqkv import load_model
from vqkv.cache.rope import RotaryAdapter
from vqkv.calibration import read_text, text_windows
from vqkv.calibration.capture import Kind, StateCapture
from vqkv.codebooks.kmeans import KMeans
from vqkv.kernels.encode import encode
from vqkv.provenance import write
from vqkv.rotation import Pairs
from vqkv.states import States
from vqkv.texts import bundled_text
from vqkv.transforms.pair_metric import PairMetric, PairMetricConfig

TEXT, TOKENS, CONTEXT, SINKS = "emma", 16384, 2048, 4
#: Windows that are fitted on; the others are what is measured.
FITTED = 4
LAYERS = range(1, 30, 4)
DIM, CODEWORDS, ITERATIONS = 4, 256, 10


class Frames(NamedTuple):
    """A way to turn keys before they are coded.

    Attributes:
        tokens: of a frame; of one token, nothing is turned.
        fastest: of P pairs so many, the first ones, are left as they are.
        centred: means are taken off first.
        apart: the fastest pairs are in groups of their own.
    """

    tokens: int
    fastest: int = 0
    centred: bool = False
    apart: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        parts = [f"{self.tokens} tokens"]
        parts += [f"all but {self.fastest} pairs"] if self.fastest else []
        parts += ["means apart"] if self.centred else []
        parts += ["groups apart"] if self.apart else []
        return ", ".join(parts)

    def grouped(self, pairs: Pairs) -> list[Pairs]:
        """Pairs that groups are made of."""
        return [pairs[: self.fastest], pairs[self.fastest :]] if self.apart else [pairs]


BEFORE_ROPE = Frames(1)
WAYS = (
    Frames(4),
    Frames(16),
    Frames(64),
    Frames(16, centred=True),
    Frames(16, fastest=8),
    Frames(16, fastest=10),
    Frames(16, fastest=16),
    Frames(64, fastest=16),
    Frames(1, fastest=16, apart=True),
    Frames(64, fastest=16, apart=True),
)


class Captured(NamedTuple):
    """Of one layer, by window, without the sinks: keys before RoPE, and the loss's gradients."""

    keys: list[torch.Tensor]
    gradients: list[torch.Tensor]


def captured() -> tuple[dict[int, Captured], dict[int, tuple[Pairs, torch.Tensor]]]:
    """States `[T, H, D]` by layer; pairs, and turns `[T, P, 2]` of the positions that they have."""
    model, tokenizer = load_model("demo")
    found = {layer: Captured([], []) for layer in LAYERS}

    def take(layer: int, kind: Kind, states: torch.Tensor) -> None:
        tokens = states[0, :, SINKS:].transpose(0, 1).float()
        (found[layer].keys if kind == "pre_keys" else found[layer].gradients).append(tokens)

    windows = text_windows(tokenizer, read_text(bundled_text(TEXT)), TOKENS, CONTEXT)
    wants: Mapping[int, list[Kind]] = {layer: ["pre_keys", "grad_pre_keys"] for layer in LAYERS}
    with StateCapture(model, wants, take) as running:
        for window in track(windows, "capture", transient=True):
            running.run(window)
    adapter = RotaryAdapter(model, LAYERS)
    positions = torch.arange(CONTEXT)[None]
    head_dim = found[LAYERS[0]].keys[0].shape[2]
    with torch.no_grad():
        turns = {
            layer: (adapter.pairs(layer), adapter.turns(layer, positions, head_dim)[0])
            for layer in LAYERS
        }
    return found, turns


def turned(
    x: torch.Tensor, way: Frames, pairs: Pairs, turns: torch.Tensor, *, back: bool = False
) -> torch.Tensor:
    """Of tokens `[T, H, D]` from position `SINKS` on, each by its offset in its frame, or back."""
    offsets = torch.arange(SINKS, SINKS + len(x)) % way.tokens
    turn = torch.view_as_complex(turns)[offsets]  # [T, P]
    turn[:, : way.fastest] = 1
    turn = turn.conj() if back else turn
    channels = torch.tensor(pairs)
    both = torch.view_as_complex(x[..., channels].contiguous()) * turn[:, None]
    result = x.clone()
    result[..., channels] = torch.view_as_real(both)
    return result


def cost(layer: Captured, way: Frames, pairs: Pairs, turns: torch.Tensor) -> float:
    """Mean of `eᵀ M e` over tokens and heads that were not fitted on, M of their gradients."""
    mean = torch.cat(layer.keys[:FITTED]).mean(0) if way.centred else 0
    keys = [turned(x - mean, way, pairs, turns) for x in layer.keys]
    gradients = [turned(g, way, pairs, turns) for g in layer.gradients[:FITTED]]
    error = torch.zeros_like(torch.cat(keys[FITTED:]))
    for part in way.grouped(pairs):
        channels = torch.tensor(part).flatten()
        of_part = ([x[..., channels] for x in states] for states in (keys, gradients))
        error[..., channels] = errors(*of_part)
    windows = error.split([len(x) for x in keys[FITTED:]])
    error = torch.cat([turned(e, way, pairs, turns, back=True) for e in windows]).double()
    metric = fisher(layer.gradients[FITTED:])
    return float(torch.einsum("nhd,hde,nhe->nh", error, metric, error).mean())


def errors(keys: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
    """Errors `[N, H, D]` of windows that were not fitted on; pairs lie side by side."""
    fitted, channels = torch.cat(keys[:FITTED]), range(0, keys[0].shape[2], 2)
    transform = PairMetric(PairMetricConfig(metric="fisher", dim=DIM))
    transform.fit(States.of(fitted), fisher(gradients), tuple((i, i + 1) for i in channels))

    def subvectors(x: torch.Tensor) -> torch.Tensor:
        return transform.forward(x)[0].flatten(1).unflatten(1, (-1, DIM))

    learner = KMeans(iterations=ITERATIONS)
    learner.fit(subvectors(fitted), CODEWORDS)
    words = learner.codewords_.float()
    measured = torch.cat(keys[FITTED:])
    codes = encode(subvectors(measured), words)[:, :, 0].long()
    decoded = words[torch.arange(len(words)), 0, codes].flatten(1).view(measured.shape)
    return transform.inverse(decoded, None) - measured


def fisher(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Mean of `g gᵀ` of each head, `[H, D, D]` in fp64."""
    g = torch.cat(gradients).double()
    return torch.einsum("nhd,nhe->hde", g, g) / len(g)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    layers, turns = captured()
    ratios: dict[str, dict[int, float]] = {way.name: {} for way in WAYS}
    for layer in track(LAYERS, "layers", transient=True):
        base = cost(layers[layer], BEFORE_ROPE, *turns[layer])
        for way in WAYS:
            ratios[way.name][layer] = cost(layers[layer], way, *turns[layer]) / base
    rows = [
        {"frames": name, "mean": statistics.mean(found.values()), "layers": found}
        for name, found in ratios.items()
    ]
    settings = {
        **{"text": TEXT, "tokens": TOKENS, "fitted_windows": FITTED, "context": CONTEXT},
        **{"sinks": SINKS},
        **{"dim": DIM, "codewords": CODEWORDS, "iterations": ITERATIONS},
    }
    write(arguments.out, {"settings": settings, "rows": rows})
    table = Table("frames", "mean", *map(str, LAYERS))
    for way in WAYS:
        found = ratios[way.name]
        table.add_row(
            way.name,
            f"{statistics.mean(found.values()):.3f}",
            *(f"{x:.2f}" for x in found.values()),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
