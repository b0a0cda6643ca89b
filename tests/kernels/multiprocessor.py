"""A model of a Hopper multiprocessor in the main loop of the CUDA kernel: what waits for what.

Of a loop's disassembly it takes the order of instructions and what the compiler says of each: for
how many clocks its warp issues nothing after it, and which of six counters it sets and waits for.
Warps of four schedulers issue them in turn, as their units and the one way to shared memory and L1
take them. How long units take is from NVIDIA's tables of throughput; which unit an instruction goes
to, and all of `Costs`, is what is commonly known of such GPUs, or was chosen so that times of 14
kernels that an H200 has run come near.

It is for comparing orders of instructions where there is no GPU, and knows nothing of caches, of
memory's bandwidth, or of what comes before and after the loop.

    python -m tests.kernels.multiprocessor --out benchmarks/results/gpu-model.json

compares it with `benchmarks/results/gpu-h200-variants.json`, which is of the kernel at 244d83b with
`value_scale` read after the loop, as it was until e912363: to be run in a checkout of e912363, with
this file and `sass.py` of now copied into its `tests/kernels`.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from unittest.mock import patch

from tests.kernels.sass import nvidia_tool

SCHEDULERS = 4
#: A warp's counters of instructions under way.
COUNTERS = 6
MEMORY = frozenset(("LDS", "LDG", "STS", "MOVM", "SHFL", "LDL", "STL"))

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);\s*/\* 0x[0-9a-f]{16} \*/"
)
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Costs:
    """Clocks, but for `queue`.

    Attributes:
        transposition: `movmatrix` on the way to shared memory.
        codes: a load of codes there, of which a warp touches several lines.
        turns: a load of cosines and sines, gathered one by one.
        latency: of what comes from shared memory, after its turn there.
        far_latency: of what comes from memory.
        near_latency: of what L1 and L2 hold.
        product: a matrix instruction keeps its unit.
        between: memory instructions that one scheduler issues.
        queue: memory instructions of one scheduler that wait at most.
        to_memory: from a scheduler to the way to shared memory.
        special_latency: of a power, until its counter says so.
        other_latency: of other results that a counter waits for.
        operands: until they are read.
        barrier: after its last warp has come.
    """

    transposition: int = 2
    codes: int = 4
    turns: int = 8
    latency: int = 24
    far_latency: int = 700
    near_latency: int = 300
    product: int = 8
    between: int = 4
    queue: int = 10
    to_memory: int = 4
    special_latency: int = 20
    other_latency: int = 33
    operands: int = 6
    barrier: int = 10


@dataclass(frozen=True)
class Issued:
    """An instruction, with what the compiler says of it.

    Attributes:
        stall: clocks until its warp issues the next one.
        sets: the counter that waits for its result, if any.
        frees: the one that waits until it has read its operands, if any.
        waits: for these counters, a bit each.
        target: of a branch.
    """

    opcode: str
    stall: int
    sets: int
    frees: int
    waits: int
    target: str | None

    @property
    def name(self) -> str:
        """Without modifiers."""
        return self.opcode.split(".")[0]


def main_loop(cubin: bytes) -> list[Issued]:
    """What a warp issues in a pass through a binary's main loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return loop_of(nvidia_tool("nvdisasm", "-c", "-hex", file.name))


def loop_of(text: str) -> list[Issued]:
    """Of a listing, the shortest loop with matrix instructions.

    Branches past code that has none and reads no codes are taken: that is what seldom runs.
    """
    instructions, labels = _parsed(text)
    loops = [
        (labels[each.target], end)
        for end, each in enumerate(instructions)
        if each.name == "BRA" and each.target and labels[each.target] <= end
    ]
    with_products = [loop for loop in loops if _multiplies(instructions[loop[0] : loop[1] + 1])]
    place, end = min(with_products, key=lambda loop: loop[1] - loop[0])
    path = []
    while place <= end:
        each = instructions[place]
        path.append(each)
        beyond = labels[each.target] if each.name == "BRA" and each.target else 0
        skips = place < beyond <= end and not _matters(instructions[place:beyond])
        place = beyond if skips else place + 1
    return path


def _parsed(text: str) -> tuple[list[Issued], dict[str, int]]:
    instructions: list[Issued] = []
    labels: dict[str, int] = {}
    opcode = target = None
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            opcode, target = found[2], _TARGET.search(found[3])
        elif opcode and (found := _CONTROL.match(line)):
            bits = int(found[1], 16) >> 41
            counters = (bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
            instructions.append(Issued(opcode, bits & 15, *counters, target and target[1]))
            opcode = None
    return instructions, labels


def _multiplies(instructions: Sequence[Issued]) -> bool:
    return any(each.name == "HMMA" for each in instructions)


def _matters(instructions: Sequence[Issued]) -> bool:
    return _multiplies(instructions) or any(".NA" in each.opcode for each in instructions)


@dataclass
class _Warp:
    place: int = 0
    passes: int = 0
    ready: int = 0
    at_barrier: bool = False
    under_way: list[int] = field(default_factory=lambda: [0] * COUNTERS)


class Multiprocessor:
    """Runs a loop until warps have passed through it several times each, on average.

    Args:
        loop: of `main_loop`.
        warps: of a block, which has the multiprocessor for itself.
        wavefronts: of loads from shared memory, by opcode; others take the fewest there are.
        barrier_every: passes between two barriers of the block, where the loop has one.
    """

    PASSES, WARM_UP = 10, 2

    def __init__(
        self,
        loop: Sequence[Issued],
        warps: int,
        wavefronts: Mapping[str, float] | None = None,
        barrier_every: int = 4,
        costs: Costs | None = None,
    ) -> None:
        self._loop, self._costs, self._barrier_every = loop, costs or Costs(), barrier_every
        self._wavefronts = {"LDS": 1.0, "LDS.64": 2.0, "LDS.128": 4.0} | dict(wavefronts or {})
        self._warps = [_Warp() for _ in range(warps)]
        self._last: list[_Warp | None] = [None] * SCHEDULERS
        self._busy: list[dict[str, int]] = [defaultdict(int) for _ in range(SCHEDULERS)]
        self._queued = [0] * SCHEDULERS
        self._memory_free = 0.0
        self._later: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        self._clock = 0
        self._ends: list[int] = []  # of passes, whichever warp's

    def clocks(self) -> float:
        """From one warp's end of a pass to the next one's, once all is in full swing."""
        while len(self._ends) < self.PASSES * len(self._warps):
            for counters, which in self._later.pop(self._clock, ()):
                counters[which] -= 1
            self._pass_barrier()
            for scheduler in range(SCHEDULERS):
                self._issue(scheduler)
            self._clock += 1
        first, *_, last = ends = self._ends[self.WARM_UP * len(self._warps) - 1 :]
        return (last - first) / (len(ends) - 1)

    def _pass_barrier(self) -> None:
        if all(warp.at_barrier for warp in self._warps):
            for warp in self._warps:
                warp.at_barrier, warp.place = False, warp.place + 1
                warp.ready = self._clock + self._costs.barrier

    def _issue(self, scheduler: int) -> None:
        """The warp that issued last goes first."""
        warps = self._warps[scheduler::SCHEDULERS]
        for warp in sorted(warps, key=lambda warp: warp is not self._last[scheduler]):
            each = self._loop[warp.place % len(self._loop)]
            if self._waits(warp, each):
                continue
            if each.name == "BAR" and warp.passes % self._barrier_every == 0:
                warp.at_barrier = True
                continue
            unit, clocks = self._unit(scheduler, each)
            if self._busy[scheduler][unit] > self._clock:
                continue
            if each.name in MEMORY:
                if self._queued[scheduler] >= self._costs.queue:
                    continue
                self._to_memory(scheduler, warp, each)
            else:
                special = each.name == "MUFU"
                latency = self._costs.special_latency if special else self._costs.other_latency
                self._count(warp, each.sets, latency)
                self._count(warp, each.frees, self._costs.operands)
            if unit:
                self._busy[scheduler][unit] = self._clock + clocks
            self._last[scheduler] = warp
            self._step(warp, each)
            return

    def _waits(self, warp: _Warp, each: Issued) -> bool:
        return (
            warp.at_barrier
            or warp.ready > self._clock
            or any(each.waits >> n & 1 and warp.under_way[n] for n in range(COUNTERS))
        )

    def _step(self, warp: _Warp, each: Issued) -> None:
        warp.ready, warp.place = self._clock + max(1, each.stall), warp.place + 1
        if warp.place == len(self._loop):
            warp.place, warp.passes = 0, warp.passes + 1
            self._ends.append(self._clock)

    def _unit(self, scheduler: int, each: Issued) -> tuple[str, int]:
        """The one of a scheduler's that an instruction needs, and for how many clocks."""
        name = each.name
        if name in MEMORY:
            return "memory", self._costs.between
        if name in ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2"):
            free = self._busy[scheduler]
            return ("float" if free["float"] <= free["other float"] else "other float"), 2
        if name in ("IMAD", "IDP"):
            return "float", 2
        if name == "MUFU":
            return "special", 8
        if name == "HMMA":
            return "matrix", self._costs.product
        # Uniform registers, branches and barriers have units of their own.
        others = name.startswith("U") or name in ("BRA", "BAR", "BSSY", "BSYNC", "WARPSYNC", "NOP")
        return ("", 1) if others else ("integer", 2)

    def _to_memory(self, scheduler: int, warp: _Warp, each: Issued) -> None:
        """To shared memory and L1, which take one wavefront a clock."""
        begin = max(self._memory_free, self._clock + self._costs.to_memory)
        self._memory_free = begin + self._wavefronts_of(each)
        served = int(self._memory_free)
        self._queued[scheduler] += 1
        self._later[served + 1].append((self._queued, scheduler))
        latency = self._costs.latency
        if each.name == "LDG":
            far = ".NA" in each.opcode
            latency = self._costs.far_latency if far else self._costs.near_latency
        self._count(warp, each.sets, served + 1 + latency - self._clock)
        self._count(warp, each.frees, served + 2 - self._clock)

    def _wavefronts_of(self, each: Issued) -> float:
        if each.name == "LDG":
            return self._costs.codes if ".NA" in each.opcode else self._costs.turns
        if each.name == "MOVM":
            return self._costs.transposition
        return self._wavefronts.get(each.opcode, 2.0 if each.name == "STS" else 1.0)

    def _count(self, warp: _Warp, counter: int, clocks: int) -> None:
        if counter < COUNTERS:
            warp.under_way[counter] += 1
            self._later[self._clock + clocks].append((warp.under_way, counter))


def clocks_a_token(
    cubin: bytes,
    warps: int,
    tiles: int,
    chunk: int = 0,
    wavefronts: Mapping[str, float] | None = None,
) -> float:
    """That a multiprocessor takes for a token of a KV head, in the loop of a variant.

    `chunk`: pages between two barriers, where there are any.
    """
    passes = max(1, chunk // (tiles * warps // 4))
    return Multiprocessor(main_loop(cubin), warps, wavefronts, passes).clocks() / (16 * tiles)


def _measured() -> Iterator[tuple[dict[str, Any], float]]:
    """Rows of the longest context and largest batch there, and their clocks a token."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-h200-variants.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    megahertz = float(data["gpu_before"]["clocks.max.sm"].split()[0])
    for row in data["attend"]:
        if row.get("kernel") == "cuda" and (row["context"], row["batch"]) == (1 << 17, 16):
            tokens = row["context"] * row["batch"] * 8 / 128  # 8 KV heads; 128 blocks
            yield row, row["us"] * megahertz / tokens


def compared() -> list[dict[str, Any]]:
    """The kernel of this checkout, by choices that were measured."""
    from tests.kernels.coded_cases import Case, problem
    from tests.kernels.emulation import Emulator
    from vqkv.kernels.cuda.attend_ops import attend
    from vqkv.kernels.cuda.build import compiled
    from vqkv.kernels.cuda.configs import HOPPER, AttendVariant

    found = []
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(Path(folder))
        for row, measured in _measured():
            dim, rope, sums = int(row["arm"][1]), "rope" in row["arm"], "sums" in row["arm"]
            case = Case(head_dim=128, dim=dim, heads=1, group=4, lengths=(256,), rope=rope)
            query, coded = problem(case)
            attend(query, coded, 1, emulator.launch)
            look_up = sum(emulator.wavefronts) / 2
            warps, tiles = row["warps"], row["tiles"]
            with (
                patch.object(AttendVariant, "warps", warps),
                patch.object(AttendVariant, "tiles", tiles),
            ):
                one = AttendVariant(128, dim, 4, 128 // dim, 128 // dim, rope, sums)
                cubin = compiled("attend.cu", one.macros(), HOPPER)
            opcodes = Counter(each.opcode for each in main_loop(cubin))
            if dim == 8:  # turned queries are loaded like codewords, in two wavefronts
                queries = 8 * tiles if rope else 0
                look_ups = opcodes["LDS.64"] - queries
                look_up = (look_up * look_ups + 2 * queries) / opcodes["LDS.64"]
            opcode = "LDS" if dim == 4 else "LDS.64"
            batch = tiles * warps // 4
            chunk = 64 // 4 // batch * batch
            clocks = clocks_a_token(cubin, warps, tiles, chunk, {opcode: look_up})
            found.append(
                {"arm": row["arm"], "warps": warps, "tiles": tiles}
                | {"wavefronts": [round(each, 2) for each in emulator.wavefronts]}
                | {"measured": round(measured, 2), "model": round(clocks, 2)}
            )
    return found


def main() -> None:
    """Write what `compared` found."""
    from vqkv.provenance import write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = compared()
    ratios = [row["model"] / row["measured"] for row in rows]
    mean = geometric_mean(ratios)
    write(out, {"clocks": rows, "mean_ratio": round(mean, 3)})
    for row, ratio in zip(rows, ratios, strict=True):
        print(row, f"{ratio / mean:.2f} of the mean ratio")


if __name__ == "__main__":
    main()
