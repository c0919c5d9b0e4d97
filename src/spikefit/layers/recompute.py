"""What a forward ran in, so that backward can run it again and get the same."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError
from spikefit.layers.norm import BatchNorm, OnlineRenorm, again_from, frozen_statistics, starts_of
from spikefit.layers.running import Start
from spikefit.ops.dispatch import Backend, resolve, use_backend

# What a module has to do so that backward can run it again, at the end of a message.
TO_REPEAT = (
    "Draw random numbers from torch's generators only, keep no state between calls (nor in buffers that the output "
    "depends on, as spectral_norm does), call model.train() and model.eval() between steps only, and on a GPU set "
    "torch.backends.cudnn.deterministic = True; or use strategy='bptt'."
)


class Surroundings(NamedTuple):
    """Autocast and backend of a forward.

    Attributes:
        device: type of the tensors, "cpu" or "cuda".
        enabled, dtype: of autocast there.
        backend: that `use_backend` had chosen.
        starts: running statistics of norms whose values are of these in training.
    """

    device: str
    enabled: bool
    dtype: torch.dtype
    backend: Backend
    starts: dict[OnlineRenorm, Start]

    @classmethod
    def now(cls, device: str, modules: Iterable[nn.Module]) -> "Surroundings":
        """Those of the caller, before `modules` run."""
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(device, *autocast, cast(Backend, resolve("auto")), starts_of(modules))

    @contextmanager
    def again(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within the block they hold again, wherever backward is called, and `modules` change no buffers."""
        autocast = torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled)
        with autocast, use_backend(self.backend), unchanged_buffers(modules), again_from(self.starts):
            yield


@contextmanager
def unchanged_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block `modules` may run again: statistics and counters, also of your own, move in copies of them."""
    modules = list(modules)
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    before = [(part, dict(part._buffers)) for part in parts if part._buffers]
    for part, buffers in before:
        part._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
    try:
        # our own norms need not even compute what would be thrown away
        with frozen_statistics(modules):
            yield
    finally:
        for part, buffers in before:
            part._buffers.update(buffers)


def tensors_read(module: nn.Module) -> dict[str, Tensor]:
    """What the results of `module` depend on: parameters, and running statistics where the norms use them."""
    named: dict[str, Tensor] = dict(module.named_parameters())
    for path, part in module.named_modules():
        if isinstance(part, BatchNorm | nn.modules.batchnorm._BatchNorm) and not part.training:
            found = {key: getattr(part, key) for key in ("running_mean", "running_var")}
            named |= {f"{path}.{key}": buffer for key, buffer in found.items() if buffer is not None}
    return named


def foreign(f: Tensor, inputs: list[Tensor]) -> Tensor | None:
    """A tensor that needs a gradient, on which `f` depends and which is not among the leaves `inputs`."""
    known, seen, todo = set(map(id, inputs)), set(), [f.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            return variable
        todo += [following for following, _ in node.next_functions]
    return None


def check_owned(who: str, f: Tensor, inputs: list[Tensor]) -> None:
    """Raise StrategyError if `f`, which `who` gave, needs a gradient for a tensor that is not among `inputs`."""
    outside = foreign(f, inputs)
    if outside is not None:
        raise StrategyError(
            f"{who} depends on a tensor {tuple(outside.shape)} that needs a gradient and is no parameter of it, which "
            "would get none; register it as its parameter, or use strategy='bptt' or 'checkpoint'."
        )


def random_state(device: torch.device) -> list[Tensor]:
    """States of the generators that a module on `device` draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def drawn_since(before: list[Tensor], device: torch.device) -> bool:
    """Whether random numbers have been drawn since `before`."""
    return any(not torch.equal(a, b) for a, b in zip(before, random_state(device), strict=True))


@contextmanager
def replayed(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Within the block the generators draw again from `states`; afterwards they are as before. None does nothing."""
    if states is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
