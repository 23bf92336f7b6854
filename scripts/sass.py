"""Reads what nvdisasm prints of a CUBIN: the instructions of each kernel, and where control goes from each. Knows nothing
of what the kernels are for."""

import re
import subprocess
import tempfile
from collections import deque

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")


class Kernel:
    """Instructions of one kernel in the order of their addresses, as text without the closing semicolon. What divergent
    warps take (BRA.DIV) is left out."""

    def __init__(self, name, text):
        self.name, self.instructions, labels = name, [], {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(self.instructions)
            elif instruction := INSTRUCTION.match(line):
                self.instructions.append(instruction[1])
        self.next = [self._next(index, labels) for index in range(len(self.instructions))]

    def _next(self, index, labels):
        """Indices of what may run after an instruction."""
        text = self.instructions[index]
        following = [index + 1] if index + 1 < len(self.instructions) else []
        if "BRA.DIV" in text:
            return following
        is_conditional = text.startswith("@")
        if target := TARGET.search(text):
            # `@P0 BRA P1, …` is taken where both hold.
            is_conditional |= bool(re.search(r"\bBRA(\.\S+)? !?U?P\d,", text))
            return [labels[target[1]]] * (target[1] in labels) + following * is_conditional
        ends = re.match(r"(@\S+ )?(EXIT|RET|BRX|KILL)\b", text)
        return following * is_conditional if ends else following

    def opcode(self, index):
        """`LDGSTS.E.BYPASS.128` of an instruction, without its predicate."""
        return re.sub(r"^@\S+\s+", "", self.instructions[index]).split(" ")[0]

    def matching(self, pattern):
        return [index for index in range(len(self.instructions)) if re.match(pattern, self.opcode(index))]

    def _shortest(self, start):
        """The instruction before each one that can be reached, on the path of fewest instructions."""
        before, waiting = {}, deque([start])
        while waiting:
            index = waiting.popleft()
            for after in self.next[index]:
                if after not in before:
                    before[after] = index
                    waiting.append(after)
        return before

    def _path(self, start, end):
        before, path = self._shortest(start), []
        while end in before:
            path.append(end)
            end = before[end]
            if end == start:
                return path[::-1]
        return None

    def shortest_loop(self, *patterns):
        """The loop of fewest instructions that passes one of the first pattern's instructions and one of each other's:
        the indices of one turn. None where there is no such loop."""
        best = None
        for first in self.matching(patterns[0]):
            stops, path = [first], []
            for pattern in patterns[1:]:
                paths = [self._path(stops[-1], index) for index in self.matching(pattern)]
                paths = [found for found in paths if found]
                if not paths:
                    break
                path += min(paths, key=len)
                stops.append(path[-1])
            back = self._path(stops[-1], first) if len(stops) == len(patterns) else None
            if back and (best is None or len(path) + len(back) < len(best)):
                best = path + back
        return best


def texts(nvdisasm, cubin):
    """What nvdisasm prints of every kernel of an image, by its name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]
    return {re.match(r"\w+", part)[0]: part for part in parts}


def kernels(nvdisasm, cubin):
    """Every kernel of an image, by its name."""
    return {name: Kernel(name, text) for name, text in texts(nvdisasm, cubin).items()}
