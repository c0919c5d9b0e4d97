"""The rules as values: which trace stands in the place of the input of a synapse.

    d~[t] = g~[t] slope(u[t])                 spatial part of dL/du; g~ is built from d~ of the layer above
    a[t]  = mu[t] a[t-1] + i[t],  a[0] = 0    trace of the input; no gradient flows into it
    c[t]  = lam c[t-1] + 1,       c[0] = 0    trace of the bias; 1 where mu is 0
    dW    = gain sum_t d~[t] a[t]^T           db = gain sum_t c[t] d~[t]

Every rule is approximate. All are exact at T = 1, and where no neuron keeps anything (leak 0).
"""

from dataclasses import dataclass, field

import torch

from spikefit.errors import OptionError, check_choice
from spikefit.rules.sampler import AllSteps, RandomK, Sampler, check_whole

# What mu is: 0, the leak of the neuron that the synapse feeds, or v[t] / v[t-1] of the one that it reads from.
MUS: tuple[str, ...] = ("zero", "leak", "ratio")
LOSS_NORMS: tuple[str, ...] = ("K", "T")
UPDATES: tuple[str, ...] = ("sequence", "step")
TRACE_DTYPES: tuple[torch.dtype | None, ...] = (None, torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """Base of the rules that call backward while a sequence runs and keep no graph behind it.

    Args:
        grad_scale: factor on all gradients, > 0. Rules differ in the norm of their gradient, which acts as a learning
            rate of its own.
        update_every: "sequence" for one update behind the last step, "step" for one behind every backward.

    Raises:
        OptionError: an option out of range.
    """

    grad_scale: float = 1.0
    update_every: str = "sequence"

    def __post_init__(self) -> None:
        check_scale(self.name, self.grad_scale)
        check_choice(self.name, "update_every", self.update_every, UPDATES)

    @property
    def name(self) -> str:
        """The name of the rule in recipes and messages."""
        raise NotImplementedError

    @property
    def window(self) -> int:
        """Steps from one cut of the graph to the next."""
        return 1

    @property
    def traced(self) -> bool:
        """Whether gradients of parameters read traces."""
        return False

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[tuple[int, ...], int]:
        """(steps that call backward, N by which the sum of their losses is divided) for a sequence of T steps."""
        return tuple(range(timesteps)), timesteps


@dataclass(frozen=True, kw_only=True)
class TraceRule(StepRule):
    """Gradients within a step, and a decaying sum of inputs for what earlier steps did.

        dW = gain sum_t d~[t] a[t]^T,   a[t] = mu[t] a[t-1] + i[t]

    See the head of this file for the letters, and `sltt`, `ottt` and `ndot` for the three kinds.

    Args:
        mu: "zero"; "leak", that of the neuron (or leaky read-out) the synapse feeds; "ratio", v[t] / v[t-1] of the
            neuron it reads from, in [-leak, leak], and for data the leak of the neuron it feeds.
        lag: for "ratio", 1 takes the ratio of the step before.
        sampler: steps that call backward.
        loss_norm: "K" divides the sum of the losses by the number of chosen steps, so that the gradient is unbiased;
            "T" by that of all steps.
        trace_first: False leaves the synapses that read the data, and the norms behind them, without traces.
        trace_dtype: of the traces; None for float32, or float64 where the input is.
        grad_scale, update_every: as in `StepRule`.

    Raises:
        OptionError: an option out of range.

    Source: Meng et al. 2023, arXiv:2302.14311; Xiao et al. 2022, arXiv:2210.04195; that they differ in mu alone can be
    read off their equations.
    """

    mu: str = "zero"
    lag: int = 0
    sampler: Sampler = field(default_factory=AllSteps)
    loss_norm: str = "K"
    trace_first: bool = True
    trace_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_choice("TraceRule", "mu", self.mu, MUS)
        super().__post_init__()
        check_choice(self.name, "loss_norm", self.loss_norm, LOSS_NORMS)
        if self.lag not in (0, 1) or isinstance(self.lag, bool):
            raise OptionError(f"{self.name}: lag must be 0 or 1 steps, got {self.lag!r}.")
        if self.lag and self.mu != "ratio":
            raise OptionError(f"{self.name}: lag belongs to mu='ratio', got mu={self.mu!r}; leave it out.")
        if not isinstance(self.trace_first, bool):
            raise OptionError(f"{self.name}: trace_first must be True or False, got {self.trace_first!r}.")
        if self.trace_dtype not in TRACE_DTYPES:
            raise OptionError(
                f"{self.name}: trace_dtype must be torch.float32, torch.bfloat16 or None, got {self.trace_dtype!r}."
            )

    @property
    def name(self) -> str:
        return {"zero": "sltt", "leak": "ottt", "ratio": "ndot"}[self.mu]

    @property
    def traced(self) -> bool:
        return self.mu != "zero"

    @property
    def shortest(self) -> int:
        """The least T of a sequence that it can run; 1 for a sampler of one's own that does not say."""
        return getattr(self.sampler, "least", 1)

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[tuple[int, ...], int]:
        steps = self.sampler.draw(timesteps, generator)
        return steps, timesteps if self.loss_norm == "T" else len(steps)


@dataclass(frozen=True, kw_only=True)
class TBPTT(StepRule):
    """Truncated BPTT: exact gradients inside windows of k steps, nothing across them; memory of k steps.

    Args:
        k: steps per window, at least 1; the last one may be shorter. k >= T is BPTT, k = 1 is SLTT.
        grad_scale, update_every: as in `StepRule`.

    Raises:
        OptionError: k below 1, or an option of `StepRule` out of range.

    Source: Williams, Peng 1990, doi:10.1162/neco.1990.2.4.490.
    """

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("tbptt", "k", self.k)

    @property
    def name(self) -> str:
        return "tbptt"

    @property
    def window(self) -> int:
        return self.k


def sltt(*, k: int | None = None, sampler: Sampler | None = None, **options) -> TraceRule:
    """Spatial learning through time: no path through time at all, mu = 0; nothing is kept beside the state.

    Args:
        k: K random steps call backward (SLTT-K); None for all.
        sampler: another choice of steps, in the place of `k`.
        **options: those of `TraceRule`; the published runs with K steps use loss_norm="T".

    Raises:
        OptionError: an option out of range, or both k and sampler.

    Source: Meng et al. 2023, arXiv:2302.14311.
    """
    return TraceRule(mu="zero", sampler=_sampler("sltt", k, sampler), **options)


def ottt(**options) -> TraceRule:
    """Online training through time: mu is the leak of the neuron that a synapse feeds.

    Exact for the last spiking layer and the read-out if the reset is soft and detached and the read-out has no
    membrane, with or without weight standardisation or a norm with running statistics. A norm with statistics of each
    step passes traces only approximately.

    Args:
        **options: those of `TraceRule`.

    Source: Xiao et al. 2022, arXiv:2210.04195, with the leak of each layer in the place of one for all.
    """
    return TraceRule(mu="leak", **options)


def ndot(*, lag: int = 0, **options) -> TraceRule:
    """Neuronal-dynamics-based online training: mu is v[t] / v[t-1] of the neuron that a synapse reads from.

    A heuristic; soft reset only. Bias, norm and synapses that read data use the leak of the neuron that they feed.

    Args:
        lag: 1 takes the ratio of the step before.
        **options: those of `TraceRule`.

    Source: Jiang et al., ICML 2024; accounts of it differ in `lag`.
    """
    return TraceRule(mu="ratio", lag=lag, **options)


def tbptt(k: int, **options) -> TBPTT:
    """Truncated BPTT in windows of `k` steps; see `TBPTT`."""
    return TBPTT(k=k, **options)


def _sampler(who: str, k: int | None, sampler: Sampler | None) -> Sampler:
    if k is not None and sampler is not None:
        raise OptionError(f"{who}: k={k} is the sampler RandomK({k}), and sampler={sampler!r} is given too; drop one.")
    return RandomK(k) if k is not None else AllSteps() if sampler is None else sampler


def check_scale(who: str, grad_scale: float) -> None:
    """Raise OptionError unless `grad_scale` is a finite number > 0."""
    if not 0 < grad_scale < float("inf"):
        raise OptionError(f"{who}: grad_scale must be a finite number > 0, got {grad_scale!r}.")
