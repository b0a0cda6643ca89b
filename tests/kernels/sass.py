"""What a compiled kernel issues, read from its disassembly."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
#: But wgmma's, which names another register than it reads.
_UNIFORM = re.compile(r"(?<!gdesc\[)\bUR(\d+)\b")
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One of the disassembly; `opcode` with its modifiers."""

    opcode: str
    operands: str

    def starts(self, *opcodes: str) -> bool:
        """Whether it is one of these, whatever the modifiers."""
        return self.opcode.split(".")[0] in opcodes

    def starts_with(self, *prefixes: str) -> bool:
        """Whether it is of a family of these."""
        return self.opcode.startswith(prefixes)


class Disassembly:
    """The text that `nvdisasm -c` prints of one kernel."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for line in text.splitlines():
            label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
            if label:
                self._labels[label[1]] = len(self.instructions)
            elif instruction and instruction[1] != "NOP":
                self.instructions.append(Instruction(instruction[1], instruction[2]))

    @cached_property
    def main_loop(self) -> list[Instruction]:
        """The longest loop with matrix instructions; all instructions where there is none."""
        return max(self._matrix_loops, key=len, default=self.instructions)

    @cached_property
    def inner_loop(self) -> list[Instruction]:
        """The shortest loop with matrix instructions; all instructions where there is none."""
        return min(self._matrix_loops, key=len, default=self.instructions)

    @cached_property
    def _matrix_loops(self) -> list[list[Instruction]]:
        loops = [
            self.instructions[self._labels[target[1]] : index + 1]
            for index, instruction in enumerate(self.instructions)
            if instruction.starts("BRA") and (target := _TARGET.search(instruction.operands))
        ]
        return [loop for loop in loops if any(i.starts("HGMMA", "HMMA") for i in loop)]

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return sum(i.starts("LDL", "STL") for i in self.instructions)

    @property
    def past_l1(self) -> int:
        """Copies that skip L1, as Triton's pipelining makes of wide gathers."""
        return sum("BYPASS" in i.opcode for i in self.instructions)

    @property
    def lost_products(self) -> int:
        """Matrix instructions whose result goes nowhere: the compiler erred."""
        return sum(
            i.starts("HGMMA", "HMMA") and i.operands.split(",")[0].strip() == "RZ"
            for i in self.instructions
        )

    @property
    def unset_uniforms(self) -> int:
        """Instructions that read a uniform register before any writes it: the compiler erred.

        In the order of the text; of a pair of registers the first is looked at.
        """
        written: set[int] = set()
        unset = 0
        for instruction in self.instructions:
            first, _, others = instruction.operands.partition(",")
            target = _UNIFORM.fullmatch(first.strip(" ;"))
            writes = target is not None and instruction.starts_with("U", "R2UR", "S2UR", "REDUX")
            read = _UNIFORM.findall(others if writes else instruction.operands)
            unset += any(int(register) not in written for register in read)
            if writes and target is not None:
                wide = re.search(r"\.(64|WIDE)\b", instruction.opcode) is not None
                written.update(range(int(target[1]), int(target[1]) + 1 + wide))
        return unset

    def count(self, *opcodes: str) -> int:
        """Of instructions in the main loop."""
        return sum(i.starts(*opcodes) for i in self.main_loop)

    def global_loads(self) -> Counter[int]:
        """How many loads of how many bytes a thread the main loop has."""
        loads = (i.opcode for i in self.main_loop if i.starts("LDG"))
        widths = (_WIDTH.search(opcode) for opcode in loads)
        return Counter(4 if width is None else _BYTES[width[1]] for width in widths)


def nvidia_tool(name: str, *arguments: str) -> str:
    """What one of the tools that come with Triton prints.

    Triton itself is not imported, as that fixes whether its kernels are interpreted.
    """
    triton = find_spec("triton")
    assert triton is not None and triton.origin is not None
    tool = Path(triton.origin).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
