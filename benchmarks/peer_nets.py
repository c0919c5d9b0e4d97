"""The nets of the benchmarks in the layers of SpikingJelly and snnTorch, with the structure and the weights of ours.

Each is a chain of units conv -> norm -> neuron, leak 0.5, threshold 1, soft reset, atan(2), and a linear head on the
mean over space. A unit that follows a pool holds it, as SpikingJelly's own VGG does, so that a checkpoint around the
unit keeps the spikes before the pool and nothing of the pool.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit import create_model, plan
from spikefit.layers import ResidualBlock

CLASSES = 10
VGG6 = (64, 64, "pool", 128, 128, "pool", 256, 256, "pool")
RESNET19 = ((256, 3), (512, 3), (512, 2))  # width and number of blocks of each stage; 128 in the stem
OPTIONS: dict[str, dict[str, Any]] = {"vgg6": {}, "resnet19": {"widths": "wide"}}

# First (weight, bias) of every norm, and of the norms whose current a shortcut joins. The membrane after a reset then
# stays below the threshold, where snnTorch's reset equals ours. It did not at (0.2, 0.5) for all: in vgg6 at T = 32 it
# got to 1.15, and in resnet19, where a shortcut adds a spike to the current, to 2.2.
NORM, NORM_AT_SHORTCUT = (0.1, 0.5), (0.1, 0.0)

# (net, x [T or 1, B, C, H, W]) -> logits [T, B, K] from zero state
Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Library:
    """How a peer writes the pieces of a net; each of them maps a sequence [T, B, C, H, W] to one."""

    conv: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module]
    pool: Callable[[], nn.Module]
    neuron: Callable[[], nn.Module]
    forward: Forward


class Unit(nn.Module):
    """(pool ->) conv -> norm (+ shortcut) (-> neuron); an image given once is repeated behind the norm."""

    def __init__(
        self,
        library: Library,
        channels: int,
        out: int,
        *,
        timesteps: int,
        kernel: int = 3,
        stride: int = 1,
        pool: bool = False,
        fires: bool = True,
    ) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.pool = library.pool() if pool else nn.Identity()
        self.conv = library.conv(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = library.norm(out)
        self.neuron = library.neuron() if fires else nn.Identity()

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        current = self.norm(self.conv(self.pool(x)))
        if current.shape[0] < self.timesteps:
            current = current.expand(self.timesteps, *current.shape[1:])
        if shortcut is not None:
            current = current + shortcut
        return self.neuron(current)


class Block(nn.Module):
    """Two units with a shortcut added to the current of the second, as `spikefit.layers.ResidualBlock`."""

    def __init__(self, library: Library, channels: int, out: int, *, timesteps: int, stride: int) -> None:
        super().__init__()
        self.first = Unit(library, channels, out, timesteps=timesteps, stride=stride)
        self.second = Unit(library, out, out, timesteps=timesteps)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.short = Unit(library, channels, out, timesteps=timesteps, kernel=1, stride=stride, fires=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), self.short(x))


class Net(nn.Module):
    """Blocks, mean over space, linear head."""

    def __init__(self, blocks: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((3, 4)))


class Folded(nn.Module):
    """A layer without state, applied to all steps at once: [T, B, ...] -> [T*B, ...] -> [T, B, ...]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Stepped(nn.Module):
    """snnTorch's `Leaky` over a sequence, one step after the other from zero; its spikes get the dtype of `x`."""

    def __init__(self, leaky: nn.Module) -> None:
        super().__init__()
        self.leaky = leaky

    def forward(self, x: Tensor) -> Tensor:
        # split and cat instead of unbind and stack: these keep channels-last, forward and backward
        memory, spikes = torch.zeros_like(x[0]), []
        for current in x.flatten(0, 1).split(x.shape[1]):
            s, memory = self.leaky(current, memory)
            spikes.append(s)
        return torch.cat(spikes).to(x.dtype).unflatten(0, x.shape[:2])


def spikingjelly() -> Library:
    """SpikingJelly's multi-step layers."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        functional.reset_net(net)
        return net(x)

    return Library(
        conv=lambda *a, **options: layer.Conv2d(*a, step_mode="m", **options),
        norm=lambda channels: layer.BatchNorm2d(channels, step_mode="m"),
        pool=lambda: layer.MaxPool2d(2, step_mode="m"),
        neuron=lambda: neuron.LIFNode(
            tau=2.0,
            decay_input=False,
            v_threshold=1.0,
            v_reset=None,
            detach_reset=True,
            surrogate_function=surrogate.ATan(2.0),
            step_mode="m",
        ),
        forward=forward,
    )


def snntorch() -> Library:
    """snnTorch: convolutions and norms on the folded sequence, `Leaky` stepping over time."""
    import snntorch
    from snntorch import surrogate

    return Library(
        conv=lambda *a, **options: Folded(nn.Conv2d(*a, **options)),
        norm=lambda channels: Folded(nn.BatchNorm2d(channels)),
        pool=lambda: Folded(nn.MaxPool2d(2)),
        neuron=lambda: Stepped(
            snntorch.Leaky(
                beta=0.5,
                threshold=1.0,
                reset_mechanism="subtract",
                reset_delay=False,
                spike_grad=surrogate.atan(alpha=2.0),
            )
        ),
        forward=lambda net, x: net(x),
    )


LIBRARIES: dict[str, Callable[[], Library]] = {"spikingjelly": spikingjelly, "snntorch": snntorch}


def vgg6(library: Library, timesteps: int) -> Net:
    """vgg6 of `spikefit.models.vgg`."""
    blocks: list[nn.Module] = []
    channels, pool = 3, False
    for entry in VGG6:
        if isinstance(entry, str):
            pool = True
            continue
        blocks.append(Unit(library, channels, entry, timesteps=timesteps, pool=pool))
        channels, pool = entry, False
    return Net([*blocks, library.pool()] if pool else blocks, channels)


def resnet19(library: Library, timesteps: int) -> Net:
    """resnet19 of `spikefit.models.resnet`, wide."""
    blocks: list[nn.Module] = [Unit(library, 3, 128, timesteps=timesteps)]
    channels = 128
    for width, count in RESNET19:
        for i in range(count):
            blocks.append(Block(library, channels, width, timesteps=timesteps, stride=2 if i == 0 else 1))
            channels = width
    return Net(blocks, channels)


NETS: dict[str, Callable[[Library, int], Net]] = {"vgg6": vgg6, "resnet19": resnet19}


def peer_net(library: str, model: str, timesteps: int) -> tuple[nn.Module, Forward]:
    """(module, forward) of a net of a peer."""
    pieces = LIBRARIES[library]()
    return NETS[model](pieces, timesteps), pieces.forward


def our_net(model: str, strategy: str = "bptt", *, chunk: int | None = None) -> tuple[nn.Module, Forward]:
    """(module, forward) of this package, with the first weights of the benchmarks."""
    neuron = {
        "name": "lif",
        "tau": 2.0,
        "decay_input": False,
        "v_threshold": 1.0,
        "v_reset": None,
        "detach_reset": True,
        "surrogate": "atan(2)",
    }
    net = create_model(
        model, num_classes=CLASSES, norm="bn", neuron=neuron, strategy=strategy, chunk=chunk, **OPTIONS[model]
    )
    norms = {m: NORM for m in net.modules() if hasattr(m, "running_mean")}
    norms |= {m.second.norm: NORM_AT_SHORTCUT for m in net.modules() if isinstance(m, ResidualBlock)}
    with torch.no_grad():
        for norm, (weight, bias) in norms.items():
            norm.weight.fill_(weight)
            norm.bias.fill_(bias)
    return net, lambda net, x: net(x)


def same_weights(nets: list[nn.Module]) -> None:
    """Give all nets the parameters of the first; they are met in the same order in each.

    Raises:
        ValueError: the nets differ in the number of parameters, or in the shape of one.
    """
    parameters = [[p for p in net.parameters() if p.ndim > 0] for net in nets]
    with torch.no_grad():
        for group in zip(*parameters, strict=True):
            for p in group[1:]:
                if p.shape != group[0].shape:
                    raise ValueError(f"same_weights: expected {tuple(group[0].shape)}, got {tuple(p.shape)}.")
                p.copy_(group[0])


@dataclass(frozen=True)
class Case:
    """A net and its batch."""

    model: str
    timesteps: int
    batch: int


@dataclass
class Contestant:
    """A net, its forward, and a batch: x [T, B, 3, 32, 32], labels [B]."""

    net: nn.Module
    forward: Forward
    x: Tensor
    labels: Tensor

    def step(self, samples: int | None = None) -> Tensor:
        """Forward, loss, backward on the first `samples`; earlier gradients are dropped. Returns the loss."""
        self.net.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.forward(self.net, self.x[:, :samples]).mean(0), self.labels[:samples])
        loss.backward()
        return loss.detach()

    def to(self, dtype: torch.dtype) -> None:
        """Convert net and batch in place; a repeated image stays a view."""
        self.net.to(dtype)
        self.x = self.x.to(dtype) if self.x.stride(0) else self.x[:1].to(dtype).expand_as(self.x)


def contestant(case: Case, name: str) -> Contestant:
    """The net of a case by name: "ours STRATEGY", or a peer and its forms; all have the weights and images of ours.

    The strategy "planned" is what `spikefit.plan` chooses without a budget. Forms of ours: "chunk-N" (batch rows per
    call of a weight); of peers: "channels_last", "compiled", "level-N" (SpikingJelly's memory optimiser on units and
    residual blocks).
    """
    torch.manual_seed(0)
    image, labels = torch.randn(case.batch, 3, 32, 32), torch.randint(CLASSES, (case.batch,))
    x = image.expand(case.timesteps, *image.shape)
    library, *forms = name.split()
    # ours is made before the peer's, for the same random numbers
    strategy, *rest = forms if library == "ours" else ["bptt"]
    chunk = int(rest[0].removeprefix("chunk-")) if rest else None
    ours = our_net(case.model, "bptt" if strategy == "planned" else strategy, chunk=chunk)
    if strategy == "planned":
        plan(ours[0], (x, labels), None).apply(ours[0])
    if library == "ours":
        return Contestant(*ours, x, labels)
    net, forward = peer_net(library, case.model, case.timesteps)
    same_weights([ours[0], net])
    x = x.contiguous()
    if "channels_last" in forms:
        net = net.to(memory_format=torch.channels_last)
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    levels = [int(form.removeprefix("level-")) for form in forms if form.startswith("level-")]
    if levels:
        from spikingjelly.activation_based.memopt import optimize_memory

        optimize_memory(net, (Block, Unit), lambda current: forward(current, x), level=levels[0])
    if "compiled" in forms:
        # every layer has a shape of its own: more versions of its code than the 8 that torch allows
        torch._dynamo.config.recompile_limit = 64
        net = torch.compile(net, dynamic=False)
    return Contestant(net, forward, x, labels)
