"""Which kernel runs an operation, and why the others do not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch

from vqkv.errors import KernelError, RegistryError
from vqkv.layouts import Layout
from vqkv.registry import Registry, did_you_mean

log = logging.getLogger(__name__)

Op = Literal[
    "encode",
    "encode_beam",
    "encode_heads",
    "encode_joint",
    "encode_pair",
    "encode_sums",
    "encode_trellis",
    "decode",
    "decode_codes",
    "decode_trellis",
    "attend",
    "attend_codes",
    "attend_rest",
    "pack",
    "unpack",
]

_forced: ContextVar[dict[str, str]] = ContextVar("vqkv_forced_kernels", default={})  # noqa: B039
_recorders: ContextVar[tuple[list[str], ...]] = ContextVar("vqkv_recorders", default=())


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation.

    `refuses(layout, device)`, given what `select` was given, returns None where the kernel can run
    and else the reason. Among those that can run the highest `speed` is chosen. A kernel that
    accepts and then fails raises; nothing falls back in silence. On the device types of
    `only_asked_for_on` it has to be asked for by `using`.

    `prepare`, where there is one, is for many calls that differ in their first argument alone:
    `run(x, *others)` is `prepare(*others)(x)`. Of tensors among the others it may take for granted
    what `vqkv.kernels.attend.codes.Reader` says: not where they lie.
    """

    op: Op
    name: str
    run: Callable[..., Any]
    refuses: Callable[[Any, torch.device], str | None]
    speed: int
    only_asked_for_on: tuple[str, ...] = ()
    prepare: Callable[..., Callable[[Any], Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._record()
        return self.run(*args, **kwargs)

    def prepared(self, *others: Any) -> Callable[[Any], Any]:
        """A function of the first argument alone; what depends on `others` alone is done once."""
        ready = None if self.prepare is None else self.prepare(*others)

        def call(first: Any) -> Any:
            self._record()
            return self.run(first, *others) if ready is None else ready(first)

        return call

    def _record(self) -> None:
        for recorder in _recorders.get():
            recorder.append(f"{self.op}.{self.name}")


@dataclass(frozen=True)
class Selection:
    """The kernel for a layout on a device, and each refused one's reason."""

    kernel: Kernel
    refused: dict[str, str] = field(default_factory=dict)


KERNELS: Registry[Kernel] = Registry(
    "vqkv.kernels",
    Kernel,
    {
        "encode.naive": "vqkv.kernels.encode.naive:KERNEL",
        "encode.cpu": "vqkv.kernels.encode.cpu:KERNEL",
        "encode.triton": "vqkv.kernels.encode.triton:KERNEL",
        "encode_beam.naive": "vqkv.kernels.encode.beam_naive:KERNEL",
        "encode_beam.cpu": "vqkv.kernels.encode.beam_cpu:KERNEL",
        "encode_sums.naive": "vqkv.kernels.encode.sums_naive:KERNEL",
        "encode_sums.cpu": "vqkv.kernels.encode.sums_cpu:KERNEL",
        "encode_heads.naive": "vqkv.kernels.encode.heads_naive:KERNEL",
        "encode_heads.cpu": "vqkv.kernels.encode.heads_cpu:KERNEL",
        "encode_heads.triton": "vqkv.kernels.encode.heads_triton:KERNEL",
        "encode_joint.naive": "vqkv.kernels.encode.joint_naive:KERNEL",
        "encode_joint.cpu": "vqkv.kernels.encode.joint_cpu:KERNEL",
        "encode_joint.triton": "vqkv.kernels.encode.joint_triton:KERNEL",
        "encode_trellis.naive": "vqkv.kernels.encode.trellis_naive:KERNEL",
        "encode_trellis.cpu": "vqkv.kernels.encode.trellis_cpu:KERNEL",
        "encode_pair.naive": "vqkv.kernels.encode.pair_naive:KERNEL",
        "encode_pair.triton": "vqkv.kernels.encode.pair_triton:KERNEL",
        "decode.naive": "vqkv.kernels.decode.naive:KERNEL",
        "decode.cpu": "vqkv.kernels.decode.cpu:KERNEL",
        "decode.triton": "vqkv.kernels.decode.triton:KERNEL",
        "decode_trellis.naive": "vqkv.kernels.decode.trellis_naive:KERNEL",
        "decode_trellis.cpu": "vqkv.kernels.decode.trellis_cpu:KERNEL",
        "decode_codes.naive": "vqkv.kernels.decode.codes_naive:KERNEL",
        "decode_codes.triton": "vqkv.kernels.decode.codes_triton:KERNEL",
        "attend.naive": "vqkv.kernels.attend.naive:KERNEL",
        "attend.commuted": "vqkv.kernels.attend.commuted:KERNEL",
        "attend_codes.naive": "vqkv.kernels.attend.codes_naive:KERNEL",
        "attend_codes.cuda": "vqkv.kernels.attend.codes_cuda:KERNEL",
        "attend_codes.cpu": "vqkv.kernels.attend.codes_cpu:KERNEL",
        "attend_codes.triton": "vqkv.kernels.attend.codes_triton:KERNEL",
        "attend_rest.naive": "vqkv.kernels.attend.rest_naive:KERNEL",
        "attend_rest.cpu": "vqkv.kernels.attend.rest_cpu:KERNEL",
        "attend_rest.triton": "vqkv.kernels.attend.rest_triton:KERNEL",
        "pack.naive": "vqkv.kernels.pack.naive:PACK",
        "pack.cpu": "vqkv.kernels.pack.cpu:PACK",
        "unpack.naive": "vqkv.kernels.pack.naive:UNPACK",
        "unpack.cpu": "vqkv.kernels.pack.cpu:UNPACK",
    },
)


def select(op: Op, layout: Hashable, device: torch.device | str) -> Selection:
    """The fastest kernel for `op` that takes this layout on this device.

    The layout is one stream's, but for `attend`, where a `Reading` says how many query heads read
    it too, `attend_codes`, which reads two, an `AttendLayout`, and `attend_rest`: the type of exact
    states.

    Raises:
        KernelError: none takes it, or the one asked for by `using` refuses; lists the reasons.
    """
    forced = _forced.get().get(op)
    return _select(op, layout, torch.device(device).type, forced, KERNELS.generation)


@cache
def _select(
    op: str, layout: Hashable, device_type: str, forced: str | None, generation: int
) -> Selection:
    device = torch.device(device_type)
    refused: dict[str, str] = {}
    able: list[Kernel] = []
    for name in KERNELS.names():
        if not name.startswith(f"{op}."):
            continue
        if forced is not None and name != f"{op}.{forced}":
            refused[name] = f"{forced!r} was asked for"
            continue
        try:
            kernel = KERNELS.get(name)
        except RegistryError as error:
            if forced is not None or KERNELS.is_builtin(name):
                raise
            # A plugin that is not even needed must not stop everything; nor may it stay unseen.
            warnings.warn(f"{name} is left out: {error}", stacklevel=3)
            refused[name] = str(error)
            continue
        reason = kernel.refuses(layout, device)
        if reason is None and forced is None and device_type in kernel.only_asked_for_on:
            reason = f"runs on {device_type} only when asked for"
        if reason is None:
            able.append(kernel)
        else:
            refused[name] = reason
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise KernelError(f"no kernel runs {op!r} on {device_type} for {layout}: {reasons}")
    best = max(able, key=lambda kernel: kernel.speed)
    refused |= {f"{op}.{k.name}": f"slower than {best.name}" for k in able if k is not best}
    log.info("%s on %s runs %s (%s)", op, device_type, best.name, refused or "the only kernel")
    return Selection(best, refused)


def circumstances() -> tuple[object, int]:
    """While they are equal, `select` chooses the same kernels."""
    return _forced.get(), KERNELS.generation


def asked_for(op: Op) -> str | None:
    """The kernel that `using` asks for, if any."""
    return _forced.get().get(op)


@contextmanager
def using(**kernels: str) -> Iterator[None]:
    """Ask for kernels by name within a block: `with using(encode="naive"): ...`.

    Raises:
        KernelError: no operation or kernel has that name.
    """
    for op, name in kernels.items():
        if f"{op}.{name}" not in KERNELS.names():
            raise KernelError(
                f"no kernel is called {op}.{name}.{did_you_mean(f'{op}.{name}', KERNELS.names())}"
            )
    token = _forced.set({**_forced.get(), **kernels})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def recording() -> Iterator[list[str]]:
    """Collect the names of the kernels that run within a block, in order: `"encode.cpu"`."""
    ran: list[str] = []
    token = _recorders.set((*_recorders.get(), ran))
    try:
        yield ran
    finally:
        _recorders.reset(token)


def anywhere(layout: Layout, device: torch.device) -> str | None:
    """`refuses` of a naive kernel: it runs every layout on every device."""
    return None
