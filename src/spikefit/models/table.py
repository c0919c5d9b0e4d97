"""Models by name, as recipes and the command line write them."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from spikefit.errors import OptionError
from spikefit.models.dmsn import dmsn, dmsn_ann
from spikefit.models.har import har_conv, har_mlp
from spikefit.models.mlp import mlp
from spikefit.models.network import SpikingNetwork, use_strategy
from spikefit.models.resnet import resnet19
from spikefit.models.revsformer import revsformer
from spikefit.models.revsresnet import revsresnet
from spikefit.models.trevsnn import trevsnn
from spikefit.models.vgg import vgg


@dataclass(frozen=True)
class ModelKind:
    """One row of the table.

    Attributes:
        make: makes the model.
        summary: a line about it.
        timesteps: the only number of steps that it works in; None for any.
    """

    make: Callable[..., SpikingNetwork]
    summary: str
    timesteps: int | None = None


MODELS: dict[str, ModelKind] = {
    "mlp": ModelKind(mlp, "dense spiking layers on flattened input"),
    "vgg6": ModelKind(partial(vgg, "vgg6"), "64-64-pool-128-128-pool-256-256-pool; the benchmark network"),
    "vgg9": ModelKind(partial(vgg, "vgg9"), "7 convolutions and a dense layer of 1024"),
    "vgg11": ModelKind(partial(vgg, "vgg11"), "8 convolutions, 5 pools"),
    "vgg16": ModelKind(partial(vgg, "vgg16"), "13 convolutions, 14.9 M parameters"),
    "resnet19": ModelKind(resnet19, "17 convolutions with shortcuts; widths = wide | narrow"),
    "revsresnet21": ModelKind(partial(revsresnet, "revsresnet21"), "blocks of two streams that run backwards; 11.0 M"),
    "revsresnet37": ModelKind(partial(revsresnet, "revsresnet37"), "the same with 8 blocks, 23.5 M parameters"),
    "revsformer_2_384": ModelKind(partial(revsformer, "revsformer_2_384"), "spiking attention in two streams, 5.8 M"),
    "revsformer_4_384": ModelKind(partial(revsformer, "revsformer_4_384"), "the same with 4 blocks, 9.3 M parameters"),
    "trevsnn_tiny": ModelKind(partial(trevsnn, "trevsnn_tiny"), "reversible in time, a sub-network per step; 17.4 M"),
    "trevsnn_small": ModelKind(partial(trevsnn, "trevsnn_small"), "the same, wider: 32.3 M parameters"),
    "trevsnn_dvs": ModelKind(partial(trevsnn, "trevsnn_dvs"), "the same for frames of events, T = 8, 10.4 M"),
    "trevsnn_mini": ModelKind(partial(trevsnn, "trevsnn_mini"), "the same for images of 32x32, 0.26 M parameters"),
    "dmsn_cnn12": ModelKind(
        partial(dmsn, "dmsn_cnn12"), "one time step, 12 blocks of windows, convolutions; 13.9 M", 1
    ),
    "dmsn_lstm12": ModelKind(
        partial(dmsn, "dmsn_lstm12"), "the same with LSTMs inside the windows; 14.9 M parameters", 1
    ),
    "dmsn_cnn12_ann": ModelKind(partial(dmsn_ann, "dmsn_cnn12_ann"), "analog twin of dmsn_cnn12, no spikes", 1),
    "dmsn_lstm12_ann": ModelKind(partial(dmsn_ann, "dmsn_lstm12_ann"), "analog twin of dmsn_lstm12, no spikes", 1),
    "har_mlp": ModelKind(har_mlp, "four equal dense layers, one sensor sample per time step"),
    "har_conv": ModelKind(har_conv, "convolutions over time for windows of sensor samples"),
}


@dataclass(frozen=True)
class Preset:
    """Neuron and norm of a published network, and where they stand."""

    neuron: dict[str, Any]
    norm: str
    summary: str


_EFFICIENTLIF = {
    "name": "lif",
    "tau": 4 / 3,
    "decay_input": True,
    "v_threshold": 1.0,
    "v_reset": "soft",
    "detach_reset": True,
    "surrogate": "atan(2)",
}
PRESETS: dict[str, Preset] = {
    "efficientlif": Preset(
        _EFFICIENTLIF,
        "step_bn",
        "leak 0.25, gain 0.75, batch norm per step: release of EfficientLIF-Net (Kim et al. 2023, arXiv:2305.18360)",
    ),
    "revsresnet": Preset(
        {"name": "if", "v_threshold": 1.0, "v_reset": 0.0, "detach_reset": True, "surrogate": "atan(2)"},
        "bn",
        "neurons without leak, hard reset: RevSResNet on CIFAR (Zhang and Zhang 2024, arXiv:2312.07922)",
    ),
    "revsformer": Preset(
        {
            "name": "lif",
            "tau": 2.0,
            "decay_input": True,
            "v_threshold": 1.0,
            "v_reset": 0.0,
            "detach_reset": True,
            "surrogate": "sigmoid(4)",
        },
        "bn",
        "tau 2, hard reset, sigmoid surrogate: RevSFormer on CIFAR (Zhang and Zhang 2024, arXiv:2312.07922)",
    ),
    "efficientlif_gain1": Preset(
        {**_EFFICIENTLIF, "decay_input": False},
        "step_bn",
        "efficientlif with gain 1: the input is not divided by tau",
    ),
}


def preset_of(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        OptionError: there is none; near names are listed.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}.{hint}")
    return PRESETS[name]


def create_model(name: str, *, preset: str | None = None, **options: Any) -> SpikingNetwork:
    """Make a model of the zoo.

    Args:
        name: a key of `MODELS`; `spikefit list models` shows them.
        preset: a key of `PRESETS`, whose neuron and norm the model gets where `options` have none.
        **options: those of the model, such as num_classes, input_shape, norm, neuron; `strategy` as in `use_strategy`.

    Returns:
        SpikingNetwork, [T, B, *input_shape] -> logits [T, B, K].

    Raises:
        OptionError: unknown model, preset or option; near names are listed.

    Example:
        model = create_model("vgg9", num_classes=10, neuron={"name": "lif", "tau": 2.0}, norm="step_bn")
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"create_model: expected one of {', '.join(MODELS)}, got {name!r}.{hint}")
    strategy = options.pop("strategy", None)
    if preset is not None:
        chosen = preset_of(preset)
        options = {"neuron": chosen.neuron, "norm": chosen.norm, **options}
    known = model_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"create_model {name}: unknown option {unknown[0]!r}; known: {', '.join(known)}.{hint}")
    model = MODELS[name].make(**options)
    if strategy is not None:
        use_strategy(model, strategy)
    return model


def model_options(name: str) -> list[str]:
    """Names of the options that `create_model(name, ...)` takes."""
    parameters = inspect.signature(MODELS[name].make).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
