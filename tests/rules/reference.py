"""Oracles of the rules: the equations as sums over steps, and what synapses met, written without the rules.

dW = gain sum_t d~[t] (sum_{k<=t} mu[k+1] ... mu[t] i[k])^T,   db = gain sum_t d~[t] (sum_{k<=t} lam^(t-k))
"""

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from spikefit.layers import Readout, SpikingLinear, SpikingUnit
from spikefit.layers.applying import applied_by
from spikefit.layers.weight import Standardized, apply_map, map_of, parameters_of
from spikefit.losses.losses import Loss
from spikefit.models import SpikingNetwork
from spikefit.ops.surrogate import parse_surrogate


class Quadratic(Loss):
    """mean_t sum_{b,k} (o_t - target)^2 / 2 with target (y + k) / 4, in the dtype of the logits."""

    splits_per_step = True

    def __call__(self, logits, targets):
        return torch.stack([self.step(o_t, targets) for o_t in logits]).mean()

    def step(self, logits_t, targets, *, labels=None):
        return (logits_t - self.wanted(logits_t, targets)).square().sum() / 2

    @staticmethod
    def wanted(logits_t, targets):
        return (targets[:, None] + torch.arange(logits_t.shape[1])).to(logits_t.dtype) / 4


class Dense(NamedTuple):
    """One dense spiking layer."""

    weight: Tensor
    bias: Tensor
    lam: float
    kappa: float
    theta: float


def gradients_by_sums(
    layers: list[Dense], out: tuple[Tensor, Tensor], x: Tensor, y: Tensor, rule: str, *, surrogate: str, lag: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """(dW, db) of every dense layer and the read-out under "sltt", "ottt" or "ndot", soft reset, by explicit sums."""
    T, currents, values, after, slopes = len(x), x, [x], [], []
    for layer in layers:
        v, s, membranes, slope = torch.zeros(x.shape[1], len(layer.weight), dtype=x.dtype), [], [], []
        for t in range(T):
            u = layer.lam * v + layer.kappa * (currents[t] @ layer.weight.T + layer.bias)
            s.append((u >= layer.theta).to(x.dtype))
            slope.append(parse_surrogate(surrogate).slope(u - layer.theta))
            v = u - layer.theta * s[-1]
            membranes.append(v)
        currents = torch.stack(s)
        values.append(currents)
        after.append(membranes)
        slopes.append(slope)
    do = [(o - Quadratic.wanted(o, y)) / T for o in (values[-1][t] @ out[0].T + out[1] for t in range(T))]
    d = [[g @ out[0] * slopes[-1][t] for t, g in enumerate(do)]]
    for n in range(len(layers) - 2, -1, -1):
        above = layers[n + 1]
        d.insert(0, [above.kappa * d[0][t] @ above.weight * slopes[n][t] for t in range(T)])
    found = []
    for n, layer in enumerate(layers):
        dW, db = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
        for t in range(T):
            for k in range(t + 1):
                decay = torch.ones_like(values[n][k])
                for j in range(k + 1, t + 1):
                    decay = decay * decay_at(rule, layers, after, n, j, lag)
                dW += layer.kappa * torch.einsum("bo,bi->oi", d[n][t], decay * values[n][k])
                db += layer.kappa * d[n][t].sum(0) * (0.0 if rule == "sltt" and k < t else layer.lam ** (t - k))
        found.append((dW, db))
    dW = sum(torch.einsum("bo,bi->oi", do[t], values[-1][t]) for t in range(T))
    return [*found, (dW, sum(do).sum(0))]


def decay_at(rule: str, layers: list[Dense], after: list[list[Tensor]], n: int, j: int, lag: int) -> Tensor | float:
    """mu of the synapse of layer n from step j - 1 to step j."""
    if rule == "sltt":
        return 0.0
    if rule == "ottt" or n == 0:
        return layers[n].lam
    lam, now = layers[n - 1].lam, j - lag
    v, before = after[n - 1][now], after[n - 1][now - 1] if now > 0 else torch.zeros_like(after[n - 1][now])
    ratio = torch.where(before.abs() < 1e-9, v.sign() * lam, v / before)
    return ratio.clamp(-lam, lam)


class Record:
    """Notes what every synapse reads and what gradient its output gets, and changes nothing."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.outputs: dict[nn.Module, list[Tensor]] = {}

    def note(self, part, i, z):
        z.retain_grad()
        self.inputs.setdefault(part, []).append(i.detach())
        self.outputs.setdefault(part, []).append(z)
        return z

    def weigh(self, synapse, x, chunk):
        z = apply_map(x, *parameters_of(synapse, "cpu"), map_of(synapse), chunk)
        return self.note(synapse, x, z)

    def normalise(self, norm, z, repeats):
        x, mean, var = norm.normalised(z, norm.weight, norm.bias, repeats)
        shape = (1, 1, -1, *[1] * (z.ndim - 3))
        return self.note(norm, (z - mean.view(shape)) / (var + norm.eps).sqrt().view(shape), x)

    def fire(self, neuron, current, v_0):
        return neuron(current, v_0)

    def drop(self, layer, x, p):
        return x

    def check_lean(self, unit):
        raise AssertionError("recorded units keep all")


def fed_leaks(model: nn.Module) -> dict[nn.Module, float]:
    """The leak of the neuron that each synapse and norm feeds; 0 for read-outs."""
    leaks: dict[nn.Module, float] = {}
    for module in model.modules():
        if isinstance(module, Readout):
            leaks[module.linear] = 0.0
        for layer in getattr(module, "spiking_layers", list)():
            for unit in filter(None, (layer.unit, layer.short)):
                leaks |= {part: layer.unit.neuron.coefficients()[0] for part in (unit.synapse, unit.norm)}
    return {part: leak for part, leak in leaks.items() if part is not None}


def ottt_by_record(model: SpikingNetwork, x: Tensor, y: Tensor, loss: Loss) -> dict[str, Tensor]:
    """Gradients of OTTT for any chain of units, by running it step by step and summing what was recorded."""
    record, state = Record(), model.init_state(x.shape[1], tuple(x.shape[2:]))
    for x_t in x:
        with applied_by(record):
            logits, state = model.step(x_t, state)
        (loss.step(logits, y) / len(x)).backward()
        state = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, state)
    names, found = {m: path for path, m in model.named_modules()}, {}
    model.zero_grad()
    for part, leak in fed_leaks(model).items():
        inputs, g = record.inputs[part], [z.grad for z in record.outputs[part]]
        traces = [sum(leak ** (t - k) * inputs[k] for k in range(t + 1)) for t in range(len(x))]
        weights = [sum(leak ** (t - k) for k in range(t + 1)) for t in range(len(x))]
        axes = [a for a in range(g[0].ndim) if a != 2]
        if part.bias is not None:
            found[f"{names[part]}.bias"] = sum(c * g_t.sum(axes) for c, g_t in zip(weights, g, strict=True))
        if hasattr(part, "running_mean"):
            found[f"{names[part]}.weight"] = sum((g_t * a).sum(axes) for a, g_t in zip(traces, g, strict=True))
            continue
        rows, g_rows = torch.cat(traces).flatten(0, 1), torch.cat(g).flatten(0, 1)
        if isinstance(part, nn.Linear):
            d_weight = g_rows.T @ rows
        else:
            by = nn.grad.conv2d_weight if isinstance(part, nn.Conv2d) else nn.grad.conv1d_weight
            shape = part.weight.shape
            d_weight = by(rows, shape, g_rows, part.stride, part.padding, part.dilation, part.groups)
        if isinstance(part, Standardized):
            chain = torch.autograd.grad(part.standardized(), [part.weight, part.gain], d_weight)
            found |= {f"{names[part]}.weight": chain[0], f"{names[part]}.gain": chain[1]}
        else:
            found[f"{names[part]}.weight"] = d_weight
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters by name, zeros where there is none; they are taken away."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def bptt(model: SpikingNetwork, x: Tensor, y: Tensor, loss: Loss) -> dict[str, Tensor]:
    """Gradients by autograd over the whole sequence."""
    model.zero_grad()
    loss(model(x), y).backward()
    return gradients(model)


def error(got: dict[str, Tensor], wanted: dict[str, Tensor], names: str = "") -> float:
    """Largest relative error of the gradients whose names contain `names`, each against the norm of its own."""
    chosen = [n for n in wanted if names in n]
    assert chosen
    for n in chosen:
        assert wanted[n].norm() > 0, f"{n}: a zero gradient proves nothing"
    return max(float((got[n] - wanted[n]).norm() / wanted[n].norm()) for n in chosen)


def dense_net(
    widths=(7, 8, 6), classes=3, *, neurons=None, norm="none", head_tau=None, seed=0, **options
) -> SpikingNetwork:
    """Dense spiking layers and a read-out in float64; `neurons` lists one neuron per layer, else all get `options`."""
    torch.manual_seed(seed)
    neuron = {"name": "lif", "surrogate": "sigmoid(4)", **options}
    blocks: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        chosen = neuron if neurons is None else {**neuron, **neurons[i]}
        blocks.append(SpikingLinear(a, b, norm=norm, neuron=chosen))
    net = SpikingNetwork([*blocks, Readout(widths[-1], classes, tau=head_tau)], input_shape=(widths[0],)).double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, SpikingUnit):
                module.synapse.weight.mul_(3)
                if module.synapse.bias is not None:
                    module.synapse.bias.uniform_(0, 0.5)
    return net


def sample(T=9, B=4, shape=(7,), classes=3, seed=1) -> tuple[Tensor, Tensor]:
    """Random spikes [T, B, ...] in float64 and targets [B]."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand((T, B, *shape), generator=generator) < 0.4).double()
    return x, torch.randint(classes, (B,), generator=generator)


def held_at_most(net: nn.Module, x: Tensor, train: Callable[[], object]) -> int:
    """The most bytes that autograd holds at any time of `train()`; what is freed is subtracted.

    Parameters and buffers of `net` and the input `x` are left out.
    """
    held, most = {}, [0]
    known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}

    class Packed:
        def __init__(self, t: Tensor):
            self.tensor, self.key = t, t.untyped_storage().data_ptr()
            if self.key not in known:
                held[self.key] = [held.get(self.key, [0])[0] + 1, t.untyped_storage().nbytes()]
            most[0] = max(most[0], sum(size for _, size in held.values()))

        def __del__(self):
            if self.key in held:
                held[self.key][0] -= 1
                if held[self.key][0] == 0:
                    del held[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda p: p.tensor):
        train()
    gc.collect()
    return most[0]


def live_at_most(train: Callable[[], object]) -> int:
    """The most bytes of all tensors made in `train()` that live at one time, beside what kernels use inside."""
    sizes: dict[int, int] = {}
    most = [0]

    class Live(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for t in tree_leaves(out):
                key = t.untyped_storage()._cdata if isinstance(t, Tensor) else None
                if key is not None and key not in given and key not in sizes:
                    sizes[key] = t.untyped_storage().nbytes()
                    weakref.finalize(t.untyped_storage(), sizes.pop, key)
            most[0] = max(most[0], sum(sizes.values()))
            return out

    with Live():
        train()
    return most[0]
