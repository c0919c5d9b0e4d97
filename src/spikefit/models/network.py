"""The network: a chain of blocks, its state as a value, and the strategy that runs it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.engines.plan import Plan
from spikefit.engines.strategy import Strategy, parse_strategy
from spikefit.errors import OptionError, ShapeError, StateError, StrategyError
from spikefit.layers import SpikingUnit
from spikefit.layers.chain import State
from spikefit.layers.keeping import Keeping
from spikefit.layers.norm import needs_whole_calls
from spikefit.layers.shared import TAKES, SharedStage, check_groups, check_share, shares_layers
from spikefit.layers.weight import check_floating
from spikefit.models.checks import check_count
from spikefit.neurons import SpikingNeuron
from spikefit.ops.dtype import compute_dtype


class SpikingNetwork(nn.Module):
    """A chain of blocks from a sequence [T, B, ...] to logits [T, B, K].

    A block is a module `(sequence, state) -> (sequence, state)`: the units, residual blocks and layers of
    `spikefit.layers`, or your own with the same two results and an `init_state`.

    Args:
        blocks: the chain, in the order the data flows.
        input_shape: shape of one input sample without time and batch, (C, H, W) or (C,).
        timesteps: fixed length of the sequence, needed (and allowed) only if a block consumes time.
        share: which layers use one membrane: "none", "layer" (those of a stage, in turn), "channel" (groups of channels
            of a layer, in turn) or "layer_channel".
        groups: number of groups for the two with channels, a divisor of every layer's channels; else 1.
        stages: for the two with layers alone, (first, last) numbers of the blocks of every stage; the others stand
            alone.
        strategy: how gradients are obtained, see `use_strategy`; None for "replay" where membranes are shared, else
            "bptt".

    Raises:
        OptionError: no block, a block consumes time and `timesteps` is missing, membranes that cannot be shared as
            asked, or blocks that share otherwise in another network; the layer is named.

    Example:
        blocks = [SpikingConv2d(3, 32, pool="max"), GlobalAveragePool(), Readout(32, 10)]
        net = SpikingNetwork(blocks, input_shape=(3, 32, 32))
        logits = net(encoding.repeat(images, timesteps=8))
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        input_shape: tuple[int, ...],
        timesteps: int | None = None,
        share: str = "none",
        groups: int = 1,
        stages: Iterable[tuple[int, int]] = (),
        strategy: str | Strategy | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.input_shape = tuple(input_shape)
        # T where the length is fixed, and T where blocks need that many steps at once
        self.timesteps = self._window = timesteps
        self.strategy = Strategy()
        if not self.blocks:
            raise OptionError("SpikingNetwork: expected at least one block, got none.")
        consumers = self.time_consumers()
        if consumers and timesteps is None:
            raise OptionError(
                f"SpikingNetwork: {', '.join(consumers)} consume time; give timesteps=T, the sequence length."
            )
        if timesteps is not None and not consumers:
            raise OptionError("SpikingNetwork: timesteps is fixed only where a block consumes time; leave it out.")
        self._share(share, groups, list(stages))
        use_strategy(self, strategy or ("bptt" if share == "none" else "replay"))

    @property
    def chain(self) -> list[Any]:
        """What runs one after the other: the blocks, and stages in the place of those that share a membrane."""
        made: list[Any] = list(self.blocks)
        for first, last in reversed(self.stages):
            made[first : last + 1] = [SharedStage(made[first : last + 1], first=first)]
        return made

    def _share(self, share: str, groups: int, stages: list[tuple[int, int]]) -> None:
        """Let layers and groups of channels use one membrane, and check that they can."""
        who, layers = type(self).__name__, self._firing()
        check_share(who, share, groups, layers)
        if shares_layers(share) and not stages:
            raise OptionError(
                f"{who}: share={share!r} needs stages of layers of one shape, and there are none here; use "
                "share='channel', or give stages=[(first, last), ...]."
            )
        if stages and not shares_layers(share):
            raise OptionError(
                f"{who}: stages are those of share='layer' and 'layer_channel', got stages={stages} with "
                f"share={share!r}; leave them out, or choose one of the two."
            )
        self.share, self.groups, self.stages = share, groups, self._read_stages(stages)
        for name, unit in layers.items():
            found = cast(SpikingNeuron, unit.neuron).groups
            if found not in (1, groups):
                raise OptionError(
                    f"{who}: expected a layer without groups, as this network has groups={groups}, got {name} with "
                    f"groups={found}, which another network may use; build new blocks, or take those of "
                    f"copy.deepcopy with neuron.groups = 1. {TAKES}"
                )
            if share != "none":
                check_groups(name, unit, groups)
        whole = [name for name, m in self.named_modules() if needs_whole_calls(m)]
        if self.stages and whole:
            raise OptionError(
                f"{who}: share={share!r} runs step by step, and {whole[0]} needs the whole sequence; "
                "use norm='step_bn' ('ws', 'none'), or share='channel'."
            )
        if self.stages and self.time_consumers():
            raise OptionError(
                f"{who}: share={share!r} runs step by step, and {self.time_consumers()[0]} needs the whole sequence; "
                "use share='channel'."
            )
        if self.stages:
            self.init_state(1, device="meta")  # complains about stages whose layers differ in shape
        for unit in layers.values():
            cast(SpikingNeuron, unit.neuron).groups = groups

    def _firing(self) -> dict[str, SpikingUnit]:
        """The units with neurons by name."""
        return {n: m for n, m in self.named_modules() if isinstance(m, SpikingUnit) and m.neuron is not None}

    def _check_groups(self) -> None:
        """Raise OptionError if another network was made of the same blocks since, with other groups."""
        for name, unit in self._firing().items():
            found = cast(SpikingNeuron, unit.neuron).groups
            if found != self.groups:
                raise OptionError(
                    f"{type(self).__name__}: it was made with groups={self.groups}, and {name} now has groups={found}, "
                    "because another network was made of the same blocks; build that one of new blocks, or of "
                    "copy.deepcopy(blocks)."
                )

    def _read_stages(self, stages: list[Any]) -> list[tuple[int, int]]:
        """The stages in order; OptionError unless they are runs of blocks with neurons that do not overlap."""
        who, count, found = type(self).__name__, len(self.blocks), list[tuple[int, int]]()
        for stage in stages:
            pair = isinstance(stage, tuple | list) and len(stage) == 2 and all(type(i) is int for i in stage)
            if not pair or not 0 <= stage[0] <= stage[1] < count:
                raise OptionError(
                    f"{who}: stages are (first, last) numbers of the blocks 0 to {count - 1}, got {stage!r}."
                )
            found.append((stage[0], stage[1]))
        found.sort()
        for before, stage in pairwise(found):
            if stage[0] <= before[1]:
                raise OptionError(
                    f"{who}: stages must not overlap, got {stage} behind {before}; let each block be in one of them."
                )
        for first, last in found:
            for i, block in enumerate(self.blocks[first : last + 1], first):
                if not getattr(block, "spiking_layers", list)():
                    raise OptionError(
                        f"{who}: stages consist of units and residual blocks, and blocks.{i} ({type(block).__name__}) "
                        f"has no neurons; let the stage ({first}, {last}) end before it."
                    )
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every step, from zero state.

        Args:
            x: [T, B, *input_shape]; sides of images may differ from `input_shape` where the head pools over space.

        Returns:
            logits [T, B, K] (T = 1 if the network consumes time).

        Raises:
            ShapeError: no time axis, T = 0, another number of channels, or sides that do not pass the network.
        """
        self.check_input(x)
        self._check_length(x)
        chain = self.chain
        logits, _ = self.strategy.run(chain, x, (None,) * len(chain))
        return logits

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """As `forward`, but from `state`, and with the state after the last step: for pieces of a long sequence.

        Raises:
            StateError: a state of another network or batch.
            ShapeError: as `forward`; also in training with a norm that needs the whole sequence, and if the network
                consumes time.
        """
        if self._window is not None:
            raise ShapeError(
                f"{type(self).__name__}: {self.time_consumers()[0]} needs all {self._window} time steps in one call, "
                "so there are no pieces to run. Call model(x) on a whole window, or step, which keeps the last window."
            )
        self.check_input(x)
        self._check_pieces()
        self._check_state(state)
        try:
            return self.strategy.run(self.chain, x, state)
        except StateError as error:
            raise StateError(
                f"{type(self).__name__}: the state is not one of {x.shape[1]} samples of {tuple(x.shape[2:])}. {error} "
                f"model.init_state({x.shape[1]}) makes one for the network."
            ) from None

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One time step: input [B, ...] and state -> (logits [B, K], state).

        Steps fed one by one give the logits of `forward` bit for bit in evaluation, and in training if every norm has
        statistics per step. A network that consumes time keeps its last T inputs as state and returns the logits of
        that window, zeros before the first input.

        Raises:
            StateError: a state of another network or batch.
            ShapeError: wrong shape; in training, a norm that needs all T together (it is named).
        """
        if self._window is not None:
            self._check_state(state)
            self._check_pieces()
            window = state[0]
            if not isinstance(window, Tensor) or window.shape != (self._window, *x_t.shape):
                got = tuple(window.shape) if isinstance(window, Tensor) else type(window).__name__
                raise StateError(
                    f"{type(self).__name__}: expected x_t [B, {', '.join(map(str, self.input_shape))}] and a window of "
                    f"the last {self._window} of them as state, got {tuple(x_t.shape)} and {got}. "
                    "Start with model.init_state(batch_size) and pass on what step returns."
                )
            window = torch.cat([window[1:], x_t.unsqueeze(0)])
            return self.forward(window)[-1], (window,)
        logits, state = self.run(x_t.unsqueeze(0), state)
        return logits[0], state

    def init_state(
        self,
        batch_size: int,
        input_shape: tuple[int, ...] | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Zero state for samples like those that `step` will get.

        Args:
            batch_size: B.
            input_shape: shape of one sample; that of the network if None.
            device, dtype: of the state; None for those of the parameters. Membranes of networks in half precision are
                float32.

        Raises:
            OptionError: batch_size below 1.
            ShapeError: samples of `input_shape` do not pass the network; the block is named.
        """
        check_count("init_state", "batch_size", batch_size)
        shape = self.input_shape if input_shape is None else tuple(input_shape)
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        device = like.device if device is None else device
        if self._window is not None:
            window = (self._window, batch_size, *shape)
            return (torch.zeros(window, device=device, dtype=like.dtype if dtype is None else dtype),)
        if dtype is None:
            dtype = compute_dtype(like.dtype)
        sample, state = shape, []
        for i, block in enumerate(self.chain):
            try:
                s, shape = cast(Any, block).init_state(batch_size, shape, device=device, dtype=dtype)
            except ShapeError as error:
                # its first sentence says what does not fit; what to do is known better here
                fact = str(error).partition(". ")[0]
                where = getattr(block, "name", f"blocks.{i}")
                raise ShapeError(f"{type(self).__name__}: {self._does_not_pass(sample, where, fact)}") from None
            state.append(s)
        return tuple(state)

    def _does_not_pass(self, sample: tuple[int, ...], where: str, fact: str) -> str:
        """What is expected, what came and what to do about samples of a shape that the block `where` refuses."""
        return (
            f"expected samples of {self.input_shape}, or of sides that pass all blocks, got {sample}, which do not "
            f"pass {where} ({fact}). Resize them, or create the model with input_shape={sample}."
        )

    def time_consumers(self) -> list[str]:
        """Names of the blocks that need all time steps at once (convolution or pooling over time)."""
        return [
            f"blocks.{i} ({type(b).__name__})" for i, b in enumerate(self.blocks) if getattr(b, "consumes_time", False)
        ]

    def sequence_norms(self) -> list[str]:
        """Names of the norms whose statistics run over the whole sequence."""
        return [name for name, m in self.named_modules() if getattr(m, "time_scope", "none") == "sequence"]

    def check_input(self, x: Tensor) -> None:
        """Raise ShapeError unless `x` is a sequence [T, B, ...] that the network takes."""
        who, shape = type(self).__name__, self.input_shape
        if x.ndim != len(shape) + 2 or (x.shape[2] != shape[0]):
            wanted = ", ".join(["T", "B", *map(str, shape)])
            raise ShapeError(f"{who}: expected x as [{wanted}], got {tuple(x.shape)}. {self._shape_hint(x)}")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ShapeError(f"{who}: expected at least one time step and one sample, got x of shape {tuple(x.shape)}.")
        check_floating(who, x)
        self._check_groups()
        if x.shape[2:] != shape and self._window is None and all(hasattr(b, "init_state") for b in self.blocks):
            # other sides than it was made for: torch would fail inside, or a pool leave nothing
            self.init_state(1, tuple(x.shape[2:]), device="meta")

    def _check_length(self, x: Tensor) -> None:
        who = type(self).__name__
        if self._window is not None and x.shape[0] != self._window:
            raise ShapeError(
                f"{who}: it consumes time and was made for T = {self._window}, got T = {x.shape[0]}; "
                f"create it with timesteps={x.shape[0]} or cut the sequence."
            )

    def _shape_hint(self, x: Tensor) -> str:
        """What to do about a sequence of another rank or number of channels."""
        rank, channels = len(self.input_shape) + 2, self.input_shape[0]
        if x.ndim == rank - 1 and self._window is not None:
            return "A single sequence needs a batch axis: x.unsqueeze(1)."
        if x.ndim == rank - 1:
            return "A static input needs a time axis: encoding.repeat(x, timesteps=T)."
        if x.ndim != rank:
            return "Time comes first, then the batch."
        if rank > 3 and x.shape[-1] == channels:
            return "Channels come third: x.movedim(-1, 2)."
        if rank == 3 and x.shape[1] == channels:
            return "Time comes first and channels third: x.permute(2, 0, 1) for [B, C, T]."
        return f"Give it {channels} channels, or create it with input_shape={tuple(x.shape[2:])}."

    def _check_pieces(self) -> None:
        norms = self.sequence_norms() if self.training else []
        if norms:
            raise ShapeError(
                f"{type(self).__name__}: in training {norms[0]} normalises over the whole sequence, so steps cannot "
                "be fed one by one. Use norm='step_bn', or model.eval()."
            )

    def _check_state(self, state: State) -> None:
        expected = 1 if self._window is not None else len(self.chain)
        if not isinstance(state, tuple) or len(state) != expected:
            got = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
            raise StateError(
                f"{type(self).__name__}: expected a state of {expected} entries, got {got}. "
                "Start with model.init_state(batch_size) and pass on what step returns."
            )


def use_strategy(model: nn.Module, strategy: str | dict[str, Any] | Strategy | Plan) -> nn.Module:
    """Set how the gradients of `model` are obtained, in place; outputs, parameters and `state_dict` stay the same.

    Args:
        model: a `SpikingNetwork`, or any module that contains some; for "bptt", "lean" and plans, which are a matter of
            single units, also a module of your own made of units.
        strategy: "bptt", "lean:spikes", "checkpoint:2", ... (`spikefit list strategies` shows all), or a plan.

    Returns:
        `model` itself.

    Raises:
        StrategyError: unknown name or option, or nothing in `model` that the strategy could act on, or a layer that it
            cannot rebuild, which is named.
        PlanError: the plan was made for another model.

    Example:
        model = use_strategy(create_model("vgg9"), "lean:spikes")
    """
    parsed = Strategy("lean") if isinstance(strategy, Plan) else parse_strategy(strategy)
    networks = [m for m in model.modules() if isinstance(m, SpikingNetwork)]
    units = any(isinstance(m, Keeping) for m in model.modules())
    if not networks and not (units and parsed.by_unit):
        wanted = "SpikingNetwork and no unit" if parsed.by_unit else "SpikingNetwork"
        raise StrategyError(
            f"use_strategy: {type(model).__name__} contains no {wanted}, which {parsed.name} needs; build the model "
            "from spikefit.SpikingNetwork([...]) or spikefit.create_model(...), or run the forward of a network of "
            "another library inside spikefit.pack_saved_tensors()."
        )
    for network in networks:
        parsed.check_chain(network.chain)
    if isinstance(strategy, Plan):
        return strategy.apply(model)
    parsed.set_keeps(model)
    for network in networks:
        network.strategy = parsed
    return model


@contextmanager
def restored_strategy(model: nn.Module) -> Iterator[None]:
    """After the block, strategies of networks and choices of units in `model` are what they were before."""
    networks = {m: m.strategy for m in model.modules() if isinstance(m, SpikingNetwork)}
    units = {m: m.keep for m in model.modules() if isinstance(m, Keeping)}
    try:
        yield
    finally:
        for network, strategy in networks.items():
            network.strategy = strategy
        for unit, keep in units.items():
            unit.keep = keep


@contextmanager
def plain_bptt(model: nn.Module) -> Iterator[None]:
    """`model` under plain BPTT for the time of the block."""
    with restored_strategy(model):
        if any(isinstance(m, SpikingNetwork | Keeping) for m in model.modules()):
            use_strategy(model, "bptt")
        yield
