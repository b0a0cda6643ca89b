"""What a scheme reaches beside the floor: an ideal code of the same rate, stream by stream.

    python benchmarks/floor.py ARTEFACT --work floor-states

For schemes of one spectral transform. What is left over after prediction has variances λ_i along
the axes of that transform; of Gaussian sources with these variances no code of R bits in all errs
by less than `Σ min(θ, λ_i)`, with θ such that `Σ max(0, ½ log₂ λ_i / θ) = R` (reverse
water-filling). Tokens are of very different lengths. Of Gaussian sources of variances `σ_t² λ_i`
with known lengths σ_t, the floor is lower where tokens may share their bits: that of all of them
together. Predictor and metric are the scheme's own, so these are floors of its codes, not of all
schemes. Costs are in nats of KL per token, as `vqkv tune` expects them. `--work` keeps states.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from vqkv import KVCompressor, load_model
from vqkv.calibration import Spool, calibration_windows, capture, read_text, wanted_by_all
from vqkv.calibration.source import CapturedStates
from vqkv.codec import Codec
from vqkv.compressor import Reconstructions, StreamKey
from vqkv.provenance import write
from vqkv.scheme import STREAMS
from vqkv.texts import CALIBRATION_MIX, bundled_text
from vqkv.tuning.costs import stream_costs

OUT = Path(__file__).parent / "results" / "floor.json"
TOKENS, CONTEXT = 32768, 2048
#: Lengths that stand for those of all tokens.
QUANTILES = 64


def floor(variances: torch.Tensor, bits: float) -> float:
    """Least mean squared error of Gaussian sources `[C]` coded with `bits` together."""
    variances = variances.double().clamp_min(1e-30)
    low, high = variances.log2().min() - 2 * bits, variances.log2().max()
    for _ in range(100):  # θ by bisection, in bits
        level = (low + high) / 2
        spent = 0.5 * (variances.log2() - level).clamp_min(0).sum()
        low, high = (level, high) if spent > bits else (low, level)
    return float(variances.clamp_max(2**level).sum())


def shared_floor(axes: torch.Tensor, bits: float) -> float:
    """Least mean squared error of tokens `[N, C]` that share `bits` each, their lengths known."""
    lengths = (axes.square() / axes.square().mean(0).clamp_min(1e-30)).mean(1)  # σ²
    variances = (axes.square() / lengths.clamp_min(1e-30).unsqueeze(1)).mean(0)
    middles = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    typical = lengths.quantile(middles)
    typical *= lengths.mean() / typical.mean()
    joint = torch.outer(typical, variances).flatten()
    return floor(joint, QUANTILES * bits) / QUANTILES


@torch.inference_mode()
def shares(
    compressor: KVCompressor, source: CapturedStates
) -> dict[StreamKey, tuple[float, float]]:
    """Of each stream both floors in parts of the squared error that its codes have."""
    reconstructions = Reconstructions(compressor, source)
    found = {}
    for key, codec in compressor.codecs():
        reconstructions.forget_before(key)
        both = source.states(*key).beside(reconstructions.of(key), partial(_axes, codec))
        exact, decoded = torch.cat(list(both), 1)
        error = float((exact - decoded).square().sum(1).mean())
        exact -= exact.mean(0)
        bits = codec.layout.bits_per_value * exact.shape[1]
        lowest = floor(exact.square().mean(0), bits)
        found[key] = (lowest / error, shared_floor(exact, bits) / error)
    return found


def _axes(codec: Codec, x: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor:
    """What is coded, and what it decodes to, along the transform's axes: `[2, N, C]`."""
    (transform,) = codec.transforms
    expected = 0 if codec.predictor is None else codec.predictor.predict(sources)
    decoded = codec.there_and_back(x, sources)
    left_over = (x - expected, decoded - expected)
    return torch.stack([transform.forward(y)[0].flatten(1).double() for y in left_over])


def main() -> None:
    """Measure, draw, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    model, tokenizer = load_model("demo")
    compressor = KVCompressor.from_pretrained(arguments.artefact, model.config)
    texts = [read_text(bundled_text(name)) for name in CALIBRATION_MIX]
    windows = calibration_windows(tokenizer, texts, TOKENS, CONTEXT)
    spool = Spool(arguments.work, compressor.scheme.residency.sinks)
    capture(model, wanted_by_all([compressor]), windows, spool)
    source = CapturedStates(spool, model, compressor, CONTEXT)
    costs = stream_costs(compressor, source)
    parts = shares(compressor, source)
    rows: list[dict[str, Any]] = [
        {
            "layer": layer,
            "stream": stream,
            "bits_per_value": compressor.codec(layer, stream).layout.bits_per_value,
            "cost": costs[layer, stream],
            "floor": parts[layer, stream][0] * costs[layer, stream],
            "shared_floor": parts[layer, stream][1] * costs[layer, stream],
        }
        for layer, stream in costs
    ]
    total = {name: sum(row[name] for row in rows) for name in ("cost", "floor", "shared_floor")}
    write(arguments.out, {"scheme": compressor.scheme.name, "total": total, "rows": rows})
    draw(rows, total, arguments.out.with_suffix(".png"))
    print(", ".join(f"{name} {value:.4f}" for name, value in total.items()), "nats a token")


def draw(rows: list[dict[str, Any]], total: dict[str, float], file: Path) -> None:
    """Cost and floor by layer."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for stream, colour in zip(STREAMS, ("tab:blue", "tab:orange"), strict=True):
        mine = [row for row in rows if row["stream"] == stream]
        layers = [row["layer"] for row in mine]
        axes.plot(layers, [row["cost"] for row in mine], color=colour, label=stream)
        for name, line in (("floor", ":"), ("shared_floor", "--")):
            label = f"{stream}, {name.replace('_', ' ')}"
            axes.plot(layers, [row[name] for row in mine], line, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("expected KL, nats a token")
    axes.set_title(", ".join(f"{n.replace('_', ' ')} {v:.4f}" for n, v in total.items()))
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
