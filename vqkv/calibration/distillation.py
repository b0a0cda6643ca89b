"""Distillation: codewords follow the gradient of what the model makes of them.

Learners make each stream's error small; what an error costs depends on the model behind it and on
the errors of all other streams. So a model that reads reconstructions is taught to predict what the
exact model predicts, and codewords alone may move. Fine-tuning of codebooks for weights is of this
kind (AQLM, arXiv 2401.06118, section 3.4); codes of states are chosen anew in every step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from vqkv.cache.attachment import attach
from vqkv.cache.before_use import BeforeUseCache
from vqkv.calibration.gradients import differentiable
from vqkv.calibration.partial import save_whole
from vqkv.calibration.spooling import Progress
from vqkv.codec import Codec, Encoded, take
from vqkv.compressor import KVCompressor
from vqkv.errors import StateError
from vqkv.quantizers import Quantizer
from vqkv.quantizers.codebook import CodebookQuantizer
from vqkv.scheme import learns_codewords

log = logging.getLogger(__name__)

#: Of Adam: first moments over ten steps, second ones over twenty.
BETAS = (0.9, 0.95)

#: Rows of logits turned into probabilities at a time.
ROWS = 64


class Pupil:
    """One quantizer's codewords while they learn, in fp32, and what they are rounded to."""

    def __init__(self, quantizer: CodebookQuantizer) -> None:
        self.quantizer = quantizer
        self.codewords = nn.Parameter(quantizer.codewords_.float())
        #: Of its codes before the first step, in the space that is coded, sinks included.
        self.rms_error: float | None = None

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """As the quantizer decodes them."""
        decoded: torch.Tensor = _Decode.apply(self.codewords, codes, self.quantizer)
        return decoded

    def measure(self, x: torch.Tensor, codes: torch.Tensor) -> None:
        """Note the error of codes of vectors `[N, M, d]`, the first time."""
        if self.rms_error is None:
            error = self.quantizer.decode(codes) - x
            self.rms_error = float(error.square().mean().sqrt())

    def round(self) -> None:
        """Let the quantizer code with the codewords as they are now."""
        self.quantizer.keep(self.codewords.detach())


class _Decode(torch.autograd.Function):
    """Decoded vectors, with a derivative by the codewords that they are sums of."""

    @staticmethod
    def forward(
        ctx: Any, codewords: torch.Tensor, codes: torch.Tensor, quantizer: CodebookQuantizer
    ) -> torch.Tensor:
        ctx.codes, ctx.quantizer = codes, quantizer
        return quantizer.decode(codes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.quantizer.gradient(ctx.codes, gradients[0]), None, None


class PupilCodec(Codec):
    """A codec whose reconstructions have a derivative by its codewords.

    By the states it is taken to be one: codes do not change with a small step, but errors of a
    state before coding reach the model's predictions all the same.
    """

    def __init__(self, codec: Codec, pupils: dict[Quantizer, Pupil]) -> None:
        self.__dict__.update(codec.__dict__)
        self.pupils = pupils

    def to(self, device: torch.device) -> Codec:
        """It is where the model is, from the start."""
        return self

    def there_and_back(
        self, x: torch.Tensor, sources: Sequence[torch.Tensor] = (), rows: int = 1
    ) -> torch.Tensor:
        """As coded, and with a derivative.

        Sources have none: what is predicted from them is taken off before coding and added after.
        """
        fixed = [source.detach() for source in sources]
        return super().there_and_back(x.detach(), fixed, rows) + (x - x.detach())

    @torch.no_grad()
    def encode(self, x: torch.Tensor, sources: Sequence[torch.Tensor] = ()) -> Encoded:
        """Without one."""
        return super().encode(x, sources)

    def _codes(self, quantizer: Quantizer, vectors: torch.Tensor) -> torch.Tensor:
        codes = super()._codes(quantizer, vectors)
        pupil = self.pupils.get(quantizer)
        if pupil is not None:
            pupil.measure(vectors, codes)
        return codes

    def _vectors(self, quantizer: Quantizer, codes: torch.Tensor) -> torch.Tensor:
        pupil = self.pupils.get(quantizer)
        return super()._vectors(quantizer, codes) if pupil is None else pupil.vectors(codes)


class Distillation:
    """Steps of Adam on all codewords, one per window, that survive a kill.

    Args:
        model: the exact one, on whose device the codewords learn.
        compressor: fitted; its codewords move.
        windows: token ids `[T]` of each.
        checkpoint: file for what is done, which the caller deletes.
        seed: of the windows' order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compressor: KVCompressor,
        windows: Sequence[torch.Tensor],
        checkpoint: Path,
        seed: int,
    ) -> None:
        config = compressor.scheme.calibration.distillation
        assert config is not None, "the caller sees to it"
        self.model = model
        self.windows = windows
        self.checkpoint = checkpoint
        self.step_size = config.step
        self.order = _order(len(windows), config.passes, seed)
        self._taught = {key: compressor.codec(*key, model.device) for key, _ in compressor.codecs()}
        self._compressor = compressor
        learning: dict[Quantizer, Pupil] = {
            quantizer: Pupil(quantizer)
            for codec in self._taught.values()
            for quantizer in codec.quantizers
            if isinstance(quantizer, CodebookQuantizer) and learns_codewords(quantizer.config)
        }
        self.pupils = list(learning.values())
        pupil_codecs = {codec.where: PupilCodec(codec, learning) for codec in self._taught.values()}
        self._reading = compressor.with_codecs(lambda codec: pupil_codecs[codec.where])
        self.optimizer = torch.optim.Adam(
            [{"params": [pupil.codewords]} for pupil in self.pupils], betas=BETAS, eps=1e-12
        )
        #: KL of each step's window, in nats per token, before the step.
        self.losses: list[float] = []

    def run(self, progress: Progress | None = None) -> KVCompressor:
        """The compressor with codewords as they are after the last step.

        Raises:
            StateError: predictions or gradients are not finite, or codewords beyond fp16.
        """
        self._resume()
        tell = progress or (lambda phase, done, total: None)
        tell("distil", len(self.losses), len(self.order))
        with differentiable(self.model), attach(self.model, self._reading, read="decode"):
            for window in self.order[len(self.losses) :]:
                self._step(self.windows[window][None].to(self.model.device))
                self._save()
                tell("distil", len(self.losses), len(self.order))
        for key, codec in self._compressor.codecs():
            for own, taught in zip(codec.quantizers, self._taught[key].quantizers, strict=True):
                own.load_state({name: t.cpu() for name, t in taught.state().items()})
        # Without the copies on other devices that the given one may hold, which are of before.
        return self._compressor.with_codecs(lambda codec: codec)

    def _step(self, ids: torch.Tensor) -> None:
        """Learn from one window `[1, T]`."""
        with torch.no_grad():
            exact = self.model(ids, use_cache=False).logits[0]
        cache = BeforeUseCache(self._reading, self.model.config)
        logits = self.model(ids, past_key_values=cache).logits[0]
        loss, gradient = divergence(exact, logits.detach())
        self.optimizer.zero_grad()
        logits.backward(gradient)
        gradients = [p.codewords.grad for p in self.pupils if p.codewords.grad is not None]
        if not math.isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients):
            raise StateError(
                f"distillation: after {len(self.losses)} steps predictions or gradients are not "
                f"finite: lower `calibration.distillation.step`, {self.step_size:g}, or run the "
                "model in float32"
            )
        falling = (1 + math.cos(math.pi * len(self.losses) / len(self.order))) / 2
        for group, pupil in zip(self.optimizer.param_groups, self.pupils, strict=True):
            assert pupil.rms_error is not None, "the forward has been through every codec"
            group["lr"] = self.step_size * falling * pupil.rms_error
        self.optimizer.step()
        for pupil in self.pupils:
            pupil.round()
        self.losses.append(loss)

    def _save(self) -> None:
        """Everything that the next step depends on."""
        tensors: dict[str, torch.Tensor] = {"losses": torch.tensor(self.losses).double()}
        for index, pupil in enumerate(self.pupils):
            held = {"codewords": pupil.codewords.detach(), **self.optimizer.state[pupil.codewords]}
            tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
            tensors[f"{index}.rms_error"] = torch.tensor(pupil.rms_error).double()
        save_whole({name: tensor.cpu() for name, tensor in tensors.items()}, self.checkpoint)

    def _resume(self) -> None:
        """Go on after what is done; a damaged checkpoint is one that is not there."""
        if not self.checkpoint.exists():
            return
        try:
            held = load_file(self.checkpoint)
            losses = held.pop("losses").tolist()
            states = [take(held, f"{index}.") for index in range(len(self.pupils))]
            moved = [(float(own.pop("rms_error")), own.pop("codewords")) for own in states]
        except (SafetensorError, LookupError, ValueError, TypeError) as error:
            log.warning("%s: damaged, so distilled anew: %s", self.checkpoint, error)
            return
        self.losses = losses
        for pupil, own, (rms_error, codewords) in zip(self.pupils, states, moved, strict=True):
            pupil.rms_error = rms_error
            with torch.no_grad():
                pupil.codewords.copy_(codewords)
            # Its count of steps stays on the CPU.
            self.optimizer.state[pupil.codewords] = {
                name: tensor if name == "step" else tensor.to(self.model.device)
                for name, tensor in own.items()
            }
            pupil.round()


def divergence(exact: torch.Tensor, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    """KL of predictions from exact ones in nats per token, and the gradient of its sum over tokens.

    Logits are `[T, vocabulary]`; the gradient by the second ones takes the place of `exact`. Of a
    mean it would be too small for fp16.
    """
    total = 0.0
    for p, q in zip(exact.split(ROWS), logits.split(ROWS), strict=True):
        wanted, given = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
        total += float((wanted.exp() * (wanted - given)).sum())
        p.copy_(given.exp() - wanted.exp())
    return total / len(logits), exact


def _order(windows: int, passes: int, seed: int) -> list[int]:
    """Every window once in each pass, drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    return [
        index
        for _ in range(passes)
        for index in torch.randperm(windows, generator=generator).tolist()
    ]
