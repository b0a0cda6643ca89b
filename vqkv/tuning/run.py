"""`tune`: fit one scheme at a few rates, learn what bits are worth where, and spend them there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqkv.calibration.source import CapturedStates
from vqkv.calibration.windows import Text
from vqkv.compressor import StreamKey
from vqkv.errors import SchemeError
from vqkv.evaluation.compare import Bench, Progress, Settings, keep, open_bench, texts_to_score
from vqkv.geometry import Geometry
from vqkv.scheme import STREAMS, DistillationConfig, Scheme
from vqkv.scheme_files import load_scheme
from vqkv.tuning.allocation import allocate
from vqkv.tuning.costs import stream_costs
from vqkv.tuning.curves import Curve
from vqkv.tuning.rates import Step, eighths, ladder, whole_bytes, with_steps

Steps = dict[StreamKey, Step]
Family = Literal["recommended", "fast"]
Objective = Literal["kl", "ratio"]


@dataclass(frozen=True)
class Template:
    """Where a search starts.

    Attributes:
        preset: whose streams take other rates.
        steps: that they take.
        anchors: rates that all streams are fitted at together, in parts of the budget.
    """

    preset: str
    steps: tuple[Step, ...]
    anchors: tuple[float, ...] = (0.6, 1.0, 1.5)


TEMPLATES: dict[Family, Template] = {
    "recommended": Template("recommended-2bit", eighths(0.25, 4.5)),
    # What a kernel reads: one byte for 2, 4 or 8 channels.
    "fast": Template("fast-2bit", ladder((2, 4, 8), (8,)), anchors=(0.5, 1.0, 2.0)),
}

#: Times that rates are shared out anew by what the last fit cost.
ROUNDS = 2


@dataclass(frozen=True)
class Candidate:
    """A scheme that was fitted and scored.

    Attributes:
        kl: mean over the texts, nats per token.
        ratio: of perplexities, likewise.
        expected: KL that the costs of its streams add up to.
        blind: the canary failed on some text: figures do not come from the codes.
        notes: what a reader of the figures has to know beside them.
    """

    scheme: Scheme
    bits: float
    kl: float
    ratio: float
    expected: float
    blind: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "scheme": self.scheme.to_dict()}


class _Measured(NamedTuple):
    """A candidate, what rates its streams have, and what each of them costs."""

    candidate: Candidate
    steps: Steps
    costs: dict[StreamKey, float]


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Path],
    bits: float,
    settings: Settings,
    family: Family = "recommended",
    objective: Objective = "kl",
    progress: Progress | None = None,
) -> Iterator[Candidate]:
    """Each candidate as it is scored: uniform rates, then rates by stream.

    Where the family's preset is distilled, candidates are compared before that, which takes longer
    than all the rest of a fit; the best of them is then distilled and comes last. Fits and scores
    are kept as those of `compare` are: the same call goes on where it was.

    Args:
        texts: to score candidates on; no figure of them is one of a text that was not seen.
        bits: per value, that the best may take.
        settings: what candidates have in common; they learn from its calibration texts.
        objective: by which the one to distil is chosen.

    Raises:
        SchemeError: no rate of the family is so low.
        TextError, StateError, ModelError: as `compare`.
    """
    template = TEMPLATES[family]
    base = load_scheme(template.preset)
    geometry = Geometry.from_model(model)
    available = whole_bytes(template.steps, geometry.head_dim)
    if not available:
        raise SchemeError(
            f"family {family!r}: no step of it fills whole bytes of heads of {geometry.head_dim}"
        )
    if available[0].rate > bits:
        raise SchemeError(
            f"{bits:g} bits: the lowest rate of family {family!r} is {available[0].rate:g}"
        )
    read = texts_to_score(tokenizer, texts, settings)
    # The preset as this model can have it.
    base = with_steps(base, base.name, dict.fromkeys(streams_of(geometry), available[0]), geometry)
    with open_bench(model, tokenizer, [base], settings, progress) as bench:
        search = _Search(bench, _distilled(base, None), read, available)
        measured: list[_Measured] = []
        for step in search.anchors(bits, template.anchors):
            steps = dict.fromkeys(search.keys, step)
            measured.append(search.measured(steps, f"{family}-{step.rate:g}"))
            yield measured[-1].candidate
        for turn in range(ROUNDS):
            curves = {
                key: Curve([(each.steps[key].rate, each.costs[key]) for each in measured])
                for key in search.keys
            }
            steps = allocate(curves, available, bits)
            if any(steps == each.steps for each in measured):
                break
            measured.append(search.measured(steps, f"{family}-{bits:g}-round{turn + 1}"))
            yield measured[-1].candidate
        distillation = base.calibration.distillation
        found = best([each.candidate for each in measured], bits, objective)
        # What a blind canary lets through is not worth distilling.
        if distillation is not None and not found.blind:
            named = found.scheme.model_copy(update={"name": f"{found.scheme.name}-distilled"})
            yield search.candidate(_distilled(named, distillation))


def streams_of(geometry: Geometry) -> list[StreamKey]:
    """Every stream that is coded."""
    return [(layer, stream) for layer in geometry.compressed for stream in STREAMS]


def _distilled(scheme: Scheme, distillation: DistillationConfig | None) -> Scheme:
    """The scheme with this distillation."""
    calibration = scheme.calibration.model_copy(update={"distillation": distillation})
    return scheme.model_copy(update={"calibration": calibration})


class _Search:
    """Fits, costs and scores of one template's schemes."""

    def __init__(
        self, bench: Bench, base: Scheme, texts: list[Text], steps: tuple[Step, ...]
    ) -> None:
        self.bench = bench
        self.base = base
        self.texts = texts
        self.steps = steps
        self.keys = streams_of(bench.geometry)

    def anchors(self, bits: float, parts: Sequence[float]) -> list[Step]:
        """Of the steps those nearest to parts of the budget."""
        chosen = [min(self.steps, key=lambda step: abs(step.rate - bits * p)) for p in parts]
        return list(dict.fromkeys(chosen))

    def measured(self, steps: Steps, name: str) -> _Measured:
        """The candidate with these steps."""
        scheme = with_steps(self.base, name, steps, self.bench.geometry)
        return _Measured(self.candidate(scheme), steps, self._costs(scheme))

    def candidate(self, scheme: Scheme) -> Candidate:
        """Fitted and scored."""
        rows = [row.evaluation for row in self.bench.rows(scheme, self.texts)]
        return Candidate(
            scheme,
            bits=rows[0]["bits_per_value"],
            kl=sum(row["kl"] for row in rows) / len(rows),
            ratio=sum(row["ratio"] for row in rows) / len(rows),
            expected=sum(self._costs(scheme).values()),
            blind=not all(row["canary_ok"] for row in rows),
            notes=tuple(dict.fromkeys(note for row in rows for note in row["notes"])),
        )

    def _costs(self, scheme: Scheme) -> dict[StreamKey, float]:
        kept = self.bench.home(scheme) / "costs.json"
        if not kept.exists():
            compressor = self.bench.calibrated(scheme)
            source = CapturedStates(
                self.bench.captured(scheme.residency.sinks),
                self.bench.model,
                compressor,
                self.bench.settings.context,
            )
            found = stream_costs(compressor, source)
            keep(kept, {f"{layer}.{stream}": c for (layer, stream), c in found.items()})
        costs = json.loads(kept.read_text(encoding="utf-8"))
        return {key: costs[f"{key[0]}.{key[1]}"] for key in self.keys}


def best(candidates: Sequence[Candidate], bits: float, objective: Objective) -> Candidate:
    """Of those within the budget the one of the lowest KL or perplexity ratio."""
    within = [candidate for candidate in candidates if candidate.bits <= bits + 1e-9]
    return min(within, key=lambda candidate: getattr(candidate, objective))
