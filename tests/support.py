"""What several test files share: exact inputs, counting of kept bytes, and the runs of the LIF op that are compared."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spikefit.layers import StandardizedConv2d
from spikefit.models import SpikingNetwork
from spikefit.neurons import Threshold
from spikefit.ops import dispatch
from spikefit.ops.lif import lif
from spikefit.ops.node import Reversal, two_group
from spikefit.ops.surrogate import atan, rect

_reason = dispatch.triton_refusal(torch.zeros(1))
# "triton" as a test parameter: on CPU tensors, in Triton's interpreter
TRITON = pytest.param("triton", marks=pytest.mark.skipif(_reason is not None, reason=str(_reason)))
KERNELS = ["numba", TRITON]

EQUATIONS: dict[str, dict] = {
    "soft": {},
    "soft, rest": {"v_rest": 0.25},
    "hard": {"v_reset": 0.0},
    "hard, level": {"v_reset": 0.25},
    "hard, level, rest": {"v_reset": -0.25, "v_rest": 0.125},
    "none": {"reset": False},
}
COEFFICIENTS = {"leak": 0.5, "gain": 0.75, "v_threshold": 1.0}

# Input of four calls of one membrane, leak 1/4, threshold 1, and what follows, worked out by hand: reset, detached,
# surrogate, dL/dx of L = sum of the spikes 1, 0, 1, 0.
KNOWN_TRACE = [1.25, 0.75, 1.0, 0.625]
KNOWN_GRADIENTS = [
    ("soft", True, rect(1), [1.328125, 1.3125, 1.25, 1.0]),
    ("soft", False, rect(1), [1.0, 1.0, 1.0, 1.0]),
    ("hard", True, rect(1), [1.0, 1.25, 1.0, 1.0]),
    ("hard", False, rect(1), [0.6737670898, 1.0439453125, 0.703125, 1.0]),
    ("soft", True, atan(2), [0.8561697815, 0.9507332932, 0.8333232986, 0.4908045124]),
    ("soft", False, atan(2), [0.6938785629, 0.7904527258, 0.7461291566, 0.4908045124]),
    ("hard", True, atan(2), [0.6184864582, 0.8040870753, 0.7424024686, 0.4187757051]),
    ("hard", False, atan(2), [0.4821058724, 0.7056223601, 0.6501039963, 0.4187757051]),
]


def dyadic(*shape: int, low: float = -1.0, high: float = 2.0, seed: int = 0) -> Tensor:
    """Random multiples of 1/16 in [low, high), float32 [*shape]; sums of a few are exact: rounding flips no spike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(low * 16), int(high * 16), shape, generator=generator) / 16


def assert_same_spikes(got: Tensor, wanted: Tensor) -> None:
    """Bit for bit the same spikes, of a layer that is neither silent nor saturated."""
    rate = wanted.float().mean()
    assert 0.05 < rate < 0.95, f"a silent or saturated layer proves nothing, the rate is {rate:.3f}"
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted), f"{int((got != wanted).sum())} of {wanted.numel()} spikes differ"


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    """|got - wanted| <= tolerance * max(1, largest |wanted|)."""
    assert got.dtype == wanted.dtype, f"{what}: {got.dtype} instead of {wanted.dtype}"
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    got, wanted = got.double(), wanted.double()
    error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    assert error <= tolerance, f"{what}: error {error:.2e}"


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes that autograd holds after `forward()`, each storage counted once."""
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del result
    return total


def backends_called(function: Callable[[], object], op: str = "lif") -> set[str]:
    """The backends that kernels of `op` ran on during `function()`; empty if only the reference ran."""
    called = set()
    names = (f"spikefit::{op}", f"spikefit::{op}_backward")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() in names:
                called.update({"numba", "triton"}.intersection(a for a in args if isinstance(a, str)))
            return func(*args, **(kwargs or {}))

    with Watch():
        function()
    return called


def run_lif(
    backend: str,
    x: Tensor,
    v_0: Tensor,
    *,
    learn: tuple[str, ...] = (),
    outputs: tuple[str, ...] = ("spikes", "v_T"),
    coefficients: dict[str, float] = COEFFICIENTS,
    **options,
) -> dict[str, Tensor]:
    """Forward and backward of `lif` with fixed random gradients: results and gradients by name."""
    inputs = {"d x": x.detach().requires_grad_(), "d v_0": v_0.detach().requires_grad_()}
    numbers: dict[str, float | Tensor] = dict(coefficients)
    for name in learn:
        numbers[name] = torch.tensor(coefficients[name], dtype=v_0.dtype, device=x.device, requires_grad=True)
        inputs[f"d {name}"] = numbers[name]
    spikes, v_T = lif(inputs["d x"], inputs["d v_0"], **numbers, **options, backend=backend)
    results = {"spikes": spikes, "v_T": v_T}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=v_0.dtype, device=x.device)
    for name in outputs:
        weight = torch.randn(results[name].shape, generator=generator, dtype=v_0.dtype).to(x.device)
        loss = loss + (results[name] * weight.to(results[name].dtype)).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {name: r.detach() for name, r in results.items()} | dict(zip(inputs, gradients, strict=True))


def assert_same_run(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Same spikes and last membrane bit for bit; gradients within `tolerance`."""
    assert got.keys() == wanted.keys()
    assert_same_spikes(got["spikes"], wanted["spikes"])
    assert torch.equal(got["v_T"], wanted["v_T"])
    for name in got.keys() - {"spikes", "v_T"}:
        assert wanted[name].abs().max() > 0, f"{name}: a zero gradient proves nothing"
        assert_close(got[name], wanted[name], tolerance, name)


NODE_RESETS: dict[str, dict] = {
    "hard": {"v_reset": 0.0},
    "hard, level": {"v_reset": 0.3},
    "soft": {"v_reset": None},
}


def run_node(
    backend: str, strategy: str, x: Tensor, v_0: Tensor, *, anchor_every: int | None = None, **options
) -> dict[str, Tensor]:
    """Forward and backward of `two_group` with fixed random gradients: results and gradients by name."""
    reversal = None if strategy == "bptt" else Reversal(strategy, anchor_every)
    x, v_0 = x.detach().requires_grad_(), v_0.detach().requires_grad_()
    y, v_T = two_group(x, v_0, **options, reversal=reversal, backend=backend)
    generator = torch.Generator().manual_seed(1)
    g, q = (torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in (y, v_T))
    dx, dv_0 = torch.autograd.grad([y, v_T], [x, v_0], [g, q])
    return {"y": y.detach(), "v_T": v_T.detach(), "d x": dx, "d v_0": dv_0}


def assert_same_node_run(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Same outputs and last state bit for bit, of a layer that fires; gradients within `tolerance`."""
    # an output is a spike plus beta times an input: neither all of one kind
    assert wanted["v_T"].abs().max() > 0
    for name in ("y", "v_T"):
        assert torch.equal(got[name], wanted[name]), f"{name}: {int((got[name] != wanted[name]).sum())} differ"
    for name in ("d x", "d v_0"):
        assert wanted[name].abs().max() > 0, f"{name}: a zero gradient proves nothing"
        assert_close(got[name], wanted[name], tolerance, name)


class PlainSteps(nn.Module):
    """A block of plain layers whose steps have weights of their own, with a threshold in the place of neurons.

        a = stem(x_1),   v_0 = a,   v_t = v_{t-1} / 2 + shared(private_t(s(v_{t-1}))) + a
        logits_t = head(s(mean of v_t over space))

    `stem` is called once, every depthwise `private` layer once, `shared` (1x1) and `head` in every step, and one
    threshold `fire` everywhere, on [B, 2, H, W] and on [B, 2].

    Shapes:
        [T, B, 1, H, W] with T up to `timesteps` -> [T, B, 3]; state: (step number, a, v).
    """

    consumes_time = False
    weights_per_step = True

    def __init__(self, timesteps: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.private = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1, groups=2) for _ in range(timesteps))
        self.shared = StandardizedConv2d(2, 2, 1)
        self.head = nn.Linear(2, 3)
        self.fire = Threshold()

    def init_state(self, batch_size, shape, **options):
        return None, (3,)

    def forward(self, x, state=None):
        if state is None:
            a = self.stem(x[0])
            state = 0, a, a
        first, a, v = state
        logits = []
        for t in range(first, first + len(x)):
            v = 0.5 * v + self.shared(self.private[t](self.fire(v))) + a
            logits.append(self.head(self.fire(v.mean((2, 3)))))
        return torch.stack(logits), (first + len(x), a, v)


def plain_network(block: nn.Module | None = None, **options) -> SpikingNetwork:
    """A network of `block`, a `PlainSteps` of random weights if it is None; neither silent nor saturated."""
    if block is None:
        torch.manual_seed(0)
        block = PlainSteps(**options)
        with torch.no_grad():
            block.stem.weight.mul_(3)
            block.shared.gain.fill_(2)
    return SpikingNetwork([block], input_shape=(1, 4, 4))


def known_steps(block: type[PlainSteps] = PlainSteps) -> SpikingNetwork:
    """Two steps with maps of one value each: v_0 = (1, 0), v_1 = (1.5, 0.375), v_2 = (1.75, 0.5625).

    Half of the neurons fire on v_0 and v_1, all on v_2.
    """
    made = block(2)
    with torch.no_grad():
        for weight in (made.stem.weight, made.shared.gain, *(layer.weight for layer in made.private)):
            weight.zero_()
        made.stem.bias.copy_(torch.tensor([1.0, 0.0]))
        made.shared.bias.copy_(torch.tensor([0.0, 0.375]))
        for layer in made.private:
            layer.bias.fill_(0.25)  # neither 0 nor 1: what the shared layer reads is analog
    return plain_network(made)
