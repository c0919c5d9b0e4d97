"""Stages: blocks whose layers of neurons use one membrane in turn.

    call k of a membrane:   u_k = leak v_{k-1} + gain x_k,   s_k = [u_k >= theta],   v_k = u_k - theta s_k

Inside a step a membrane is visited layer by layer and, inside a layer, group of channels by group; what the last call
of a step leaves is what the first call of the next one finds. `stage_function.py` has the backward that keeps spikes
alone.

Source: Kim et al. 2023, arXiv:2305.18360, "Sharing leaky-integrate-and-fire neurons for memory-efficient spiking neural
networks".
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, StateError, StrategyError, named
from spikefit.layers.norm import needs_whole_calls
from spikefit.layers.packed import Spikes, dense, packed_or_dense, pooled_space
from spikefit.layers.rebuild import Rebuild, check_rebuild, neuron_of
from spikefit.layers.stage_function import Flow, run_rebuilt
from spikefit.layers.unit import Layer, SpikingUnit
from spikefit.layers.weight import zero_membrane

# Neurons times steps that backward rebuilds together where layers have membranes of their own.
PIECE = 1 << 20
SHARES: tuple[str, ...] = ("none", "layer", "channel", "layer_channel")
# The end of every message about groups.
TAKES = "share='channel' and 'layer_channel' take groups=2 or more, 'none' and 'layer' take 1."


class SharedStage:
    """Runs blocks whose layers share membranes, or rebuild their own; it holds no parameters and no state.

    Args:
        blocks: the blocks of the stage, each with `spiking_layers()`.
        first: number of the first of them in its network; messages call the stage "blocks.1-3", a layer
            "blocks.2.first".
        one_membrane: all layers use one membrane, so the stage runs step by step; False leaves each layer its own.

    Shapes:
        [T, B, C, ...] -> [T, B, C', ...]. State: one membrane [B, C/n, ...], or without `one_membrane` what the block
        itself has as state: one membrane, or a tuple of one per layer.
    """

    takes_packed = True
    consumes_time = False

    def __init__(self, blocks: Sequence[nn.Module], *, first: int = 0, one_membrane: bool = True) -> None:
        self.count, last = len(blocks), first + len(blocks) - 1
        self.name = f"blocks.{first}" if last == first else f"blocks.{first}-{last}"
        self.layers: list[Layer] = []
        self.names: list[str] = []
        for number, block in enumerate(blocks, first):
            offset = len(self.layers)
            paths = {m: path for path, m in block.named_modules(prefix=f"blocks.{number}")}
            for layer in cast(Any, block).spiking_layers():
                shortcut = None if layer.shortcut is None else layer.shortcut + offset
                self.layers.append(layer._replace(source=layer.source + offset, shortcut=shortcut))
                self.names.append(paths[layer.unit])
        # alone a layer needs no turns, and can run whole sequences
        self.one_membrane = one_membrane and len(self.layers) > 1

    @property
    def membranes(self) -> list[int]:
        """Which membrane each layer uses."""
        return [0 if self.one_membrane else i for i in range(len(self.layers))]

    @property
    def units(self) -> list[SpikingUnit]:
        """The modules that the stage runs, those of shortcuts included."""
        return [u for layer in self.layers for u in (layer.unit, layer.short) if u is not None]

    def __call__(
        self, x: Spikes, state: Any = None, *, packed: bool = False, rebuild: Rebuild | None = None
    ) -> tuple[Any, Any]:
        """Run the stage over a sequence.

        Args:
            x: [T, B, C, ...], dense or packed.
            state: membranes as the last call returned them; None starts from zero.
            packed: hand the spikes on packed if backward rebuilds them.
            rebuild: how backward gets membranes back; None keeps what autograd keeps.

        Returns:
            (spikes of the last layer behind its pool, state).
        """
        before = self._opened(state)
        out: Spikes
        if rebuild is None or not torch.is_grad_enabled():
            out, after = self._run(dense(x), before)
        else:
            self.check(rebuild)
            pieces = self.pieces(x.shape[0], rebuild, self._largest(x))
            flow = Flow(self.name, self.layers, self.names, self.membranes, pieces)
            spikes, after = run_rebuilt(flow, rebuild, packed_or_dense(x), before)
            out = spikes if packed else spikes.dense()
        return out, after[0] if len(after) == 1 else tuple(after)

    def _opened(self, state: Any) -> list[Tensor | None]:
        """The state as one membrane or None per membrane of the stage."""
        count = len(set(self.membranes))
        found = [None] * count if state is None else list(state) if isinstance(state, tuple) else [state]
        if len(found) != count:
            raise StateError(
                f"{self.name}: expected a state of {count} membranes, got {len(found)}. Pass what the last call "
                "returned, or None to start from zero."
            )
        for v in found:
            if v is not None and not isinstance(v, Tensor):
                raise StateError(
                    f"{self.name}: expected a membrane as a tensor, got {type(v).__name__}. Pass what the last call "
                    "returned, or None to start from zero."
                )
        return found

    def _run(self, x: Tensor, v: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
        """Plain autograd: whole sequences where every layer has its own membrane, else step by step."""
        outs: list[Tensor] = []
        for first, last in self.pieces(x.shape[0]):
            values = [x[first:last]]
            for name, layer, membrane in zip(self.names, self.layers, self.membranes, strict=True):
                shortcut = None if layer.shortcut is None else values[layer.shortcut]
                if shortcut is not None and layer.short is not None:
                    shortcut = layer.short(shortcut)[0]
                with named(name):
                    out, v[membrane] = layer.unit(values[layer.source], v[membrane], shortcut=shortcut)
                values.append(out)
            outs.append(values[-1])
        return outs[0] if len(outs) == 1 else torch.cat(outs), v

    def pieces(self, timesteps: int, rebuild: Rebuild | None = None, values: int = 0) -> list[tuple[int, int]]:
        """The steps that are run together, for layers with at most `values` neurons of all samples.

        A layer with a membrane of its own can run whole sequences. Where backward rebuilds it, as many steps go
        together as hold `PIECE` values, so that what is rebuilt stays small beside long sequences of large layers; the
        inverse goes step by step, from one anchor to the next.
        """
        step = 1
        if not self.one_membrane and (rebuild is None or not self._runs_in_pieces()):
            step = timesteps
        elif not self.one_membrane and rebuild is not None and rebuild.name in ("replay", "integer"):
            step = max(1, PIECE // max(1, values))
        return [(t, min(timesteps, t + step)) for t in range(0, timesteps, step)]

    def _runs_in_pieces(self) -> bool:
        """Whether no norm and no weight needs the whole sequence."""
        return not any(u.consumes_time or needs_whole_calls(u.norm) for u in self.units)

    def _largest(self, x: Spikes) -> int:
        """Neurons of all samples in the largest layer."""
        if not self._runs_in_pieces():
            return 0
        return x.shape[1] * max(torch.Size(shape).numel() for shape in self.shapes(tuple(x.shape[2:])))

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """(C, ...) of the current of every layer, for input samples of `shape`.

        Raises:
            OptionError: layers of one membrane that differ in shape.
        """
        values, found = [tuple(shape)], []
        for layer in self.layers:
            membrane = layer.unit.output_shape(values[layer.source])
            found.append(membrane)
            pooled = pooled_space(membrane[1:], layer.unit.pool or "")
            values.append((membrane[0], *pooled))
        if self.one_membrane and len(set(found)) > 1:
            listed = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in zip(self.names, found, strict=True))
            raise OptionError(
                f"{self.name}: layers that share one membrane need currents of one shape, got {listed}. Use "
                "share='channel', or split the stage."
            )
        return found

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, tuple[int, ...]]:
        """(zero membranes, shape of one output sample)."""
        shapes = self.shapes(shape)
        state = [
            zero_membrane(batch_size, neuron_of(layer).state_shape(s), device=device, dtype=dtype)
            for layer, s in zip(self.layers, shapes, strict=True)
        ]
        out = (shapes[-1][0], *pooled_space(shapes[-1][1:], self.layers[-1].unit.pool or ""))
        return state[0] if self.one_membrane or len(state) == 1 else tuple(state), out

    def check(self, rebuild: Rebuild, *, any_grid: bool = False) -> None:
        """Raise StrategyError unless backward can rebuild the membranes of this stage so.

        Args:
            rebuild: how.
            any_grid: for "integer", take a grid for granted where a neuron has none.
        """
        for name, layer in zip(self.names, self.layers, strict=True):
            check_rebuild(name, layer, rebuild, any_grid=any_grid)
        if rebuild.name != "replay":
            self._check_alike(rebuild.name)

    def _check_alike(self, strategy: str) -> None:
        """Raise StrategyError where layers of one membrane differ in leak or grid, by which its calls are undone."""
        first: dict[int, int] = {}
        for i, membrane in enumerate(self.membranes):
            a, b = first.setdefault(membrane, i), i
            kinds = [(float(n.coefficients()[0]), n.frac_bits) for n in (neuron_of(self.layers[k]) for k in (a, b))]
            if kinds[0] != kinds[1]:
                told = " and ".join(f"leak={leak:g}, frac_bits={bits}" for leak, bits in kinds)
                raise StrategyError(
                    f"{self.names[a]} and {self.names[b]}: {strategy} undoes the calls of one membrane by one leak on "
                    f"one grid, got {told}; give both layers the same, split the stage, or use strategy='replay'."
                )


def shares_layers(share: str) -> bool:
    """Whether layers of a stage use one membrane."""
    return share in ("layer", "layer_channel")


def default_norm(share: str) -> str:
    """The norm of a model that names none: layers that share a membrane run step by step, and so do their norms."""
    return "step_bn" if shares_layers(share) else "bn"


def check_groups(who: str, unit: SpikingUnit, groups: int) -> None:
    """Raise OptionError unless `groups` divides the channels of `unit`, which messages call `who`, and it can share."""
    if unit.neuron is not None and not unit.neuron.takes_turns:
        raise OptionError(
            f"{who}: the two groups of {type(unit.neuron).__name__} drive each other, so its membrane cannot be used "
            "in turn; use share='none', or another neuron."
        )
    if unit.synapse.weight.shape[0] % groups:
        raise OptionError(
            f"{who}: its {_channels(unit)} cannot be divided into groups={groups}; expected such a divisor, the same "
            f"for all layers. Take another one, or another width. {TAKES}"
        )


def _channels(unit: SpikingUnit) -> str:
    """Its channels, and the numbers of groups that they can be divided into."""
    channels = int(unit.synapse.weight.shape[0])
    divisors = ", ".join(str(n) for n in range(2, channels + 1) if channels % n == 0)
    return f"{channels} channels (divisors: {divisors or 'there is none'})"


def check_share(who: str, share: str, groups: int, layers: dict[str, SpikingUnit]) -> None:
    """Raise OptionError unless `share` is known and `groups` fits it; the message tells the first of `layers`."""
    if share not in SHARES:
        raise OptionError(f"{who}: share must be one of {', '.join(SHARES)}, got {share!r}.")
    by_channel = share in ("channel", "layer_channel")
    if isinstance(groups, bool) or not isinstance(groups, int) or (groups < 2 if by_channel else groups != 1):
        wanted = "2 or more, a divisor of every layer's channels" if by_channel else "1"
        first = "".join(f"; {name} has {_channels(unit)}" for name, unit in list(layers.items())[:1])
        raise OptionError(f"{who}: share={share!r} takes groups={wanted}, got {groups!r}{first}. {TAKES}")
