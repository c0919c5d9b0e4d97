"""What T-RevSNN keeps, on paper: elements and bytes per image of the published layout, float32.

S    elements of the states of one step, X of what the stem gives
M_l  elements in the graph of F_l: 25 C_l H_l W_l, the input and output of the convolution from below, those of the
     convolution from above (t > 1); the first stage of the first step has C_1 H_1 W_1 less, as it reads x itself
"""

import math
from dataclasses import dataclass

FLOAT = 4


@dataclass(frozen=True)
class Layout:
    """Widths and sides of the four stages, and T.

    Spikes of stages 2 and 3 are read from above at the step and from below at the next one; autograd keeps them once,
    a sum over the graphs counts them twice. `bptt` is the sum, `bptt_once` leaves the second copy out.
    """

    widths: tuple[int, ...]
    sides: tuple[int, ...]
    timesteps: int

    def at(self, timesteps: int) -> "Layout":
        """The same for another T."""
        return Layout(self.widths, self.sides, timesteps)

    @property
    def stages(self) -> list[int]:
        """C_l H_l W_l."""
        return [c * side**2 for c, side in zip(self.widths, self.sides, strict=True)]

    @property
    def states(self) -> int:
        """S."""
        return sum(self.stages)

    @property
    def stem(self) -> int:
        """X."""
        return self.stages[0]

    def graphs(self, *, first: bool = False) -> list[int]:
        """M_l of every stage, of the first step or of a later one."""
        made = []
        for i, own in enumerate(self.stages):
            below = own + self.stages[i - 1] if i else 0
            above = 0
            if not first and i + 1 < len(self.stages):
                above = (self.widths[i + 1] + self.widths[i]) * self.sides[i + 1] ** 2
            made.append(25 * own + below + above - (own if first and i == 0 else 0))
        return made

    def states_kept(self, anchor_every: int | None) -> int:
        """ceil(T / A); the last alone for None."""
        return 1 if anchor_every is None else math.ceil(self.timesteps / anchor_every)

    def kept(self, kind: str, anchor_every: int | None = None) -> float:
        """Bytes from forward to backward, without stem and heads.

        Args:
            kind: "bptt", "bptt_once", "step_checkpoint", "spike_bits", "bits_alone" (no analog state), "reversible".
            anchor_every: A; None for the last state alone.
        """
        T, S, X = self.timesteps, self.states, self.stem
        graph = sum(self.graphs(first=True)) + (T - 1) * sum(self.graphs())
        anchors = FLOAT * self.states_kept(anchor_every) * S
        twice = (T - 1) * sum(self.stages[1:3])
        return {
            "bptt": FLOAT * (graph + T * S),
            "bptt_once": FLOAT * (graph + T * S - twice),
            "step_checkpoint": FLOAT * T * S,
            "spike_bits": T * S / 4 + anchors,
            "bits_alone": T * S / 4,
            "reversible": anchors,
        }[kind] + FLOAT * X

    def transient(self) -> dict[str, int]:
        """Bytes that backward takes beside states and adjoints: the graph of one F_l, or of a whole step."""
        return {"one F": FLOAT * max(self.graphs()), "whole step": FLOAT * sum(self.graphs())}

    def information(self, gain: float) -> float:
        """Bytes per step that multiplying the states by `gain` shifts out of a fixed number of digits."""
        return self.states * math.log2(1 / gain) / 8

    def table(self) -> dict[str, float]:
        """All of it in MB (1e6 bytes), elements as they are."""
        rows: dict[str, float] = {"S": self.states, "X": self.stem, "T": self.timesteps}
        rows |= {f"M_{i}": m for i, m in enumerate(self.graphs(), 1)}
        rows |= {"M_first": sum(self.graphs(first=True)), "M_later": sum(self.graphs())}
        kinds = (
            ("bptt", None),
            ("bptt_once", None),
            ("step_checkpoint", None),
            ("reversible", 2),
            ("reversible", None),
        )
        for kind, every in (*kinds, ("spike_bits", None), ("bits_alone", None)):
            rows[f"{kind}{'' if every is None else f':{every}'} (MB)"] = self.kept(kind, every) / 1e6
        return rows | {f"{what} (MB)": n / 1e6 for what, n in self.transient().items()}


MINI = Layout((16, 24, 32, 40), (32, 16, 8, 8), 4)
PUBLISHED = {
    "tiny, T=4": Layout((64, 128, 256, 384), (56, 28, 14, 14), 4),
    "small, T=4": Layout((96, 192, 384, 512), (56, 28, 14, 14), 4),
    "small, T=16": Layout((96, 192, 384, 512), (56, 28, 14, 14), 16),
    "dvs at 128, T=8": Layout((32, 64, 128, 256), (128, 64, 32, 32), 8),
}
