"""Which rule goes with which trait of a model, a loss or a rule: the table, and what is said about it.

Parts declare traits; `resolve.py` collects them with their paths and looks them up here, and nothing else knows pairs.
A rule has a row of verdicts in every trait: "yes"; "note", which runs and says what it costs; "no", which is refused;
"-", where the rule has no such option.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

# Rules as a recipe writes them; a choice of steps (sltt(k=...)) and another mode have columns of their own.
COLUMNS: tuple[str, ...] = ("sltt", "sltt_k", "ottt", "ndot", "tbptt", "rate", "rate:sequence")
VERDICTS: tuple[str, ...] = ("yes", "note", "no", "-")


@dataclass(frozen=True)
class Trait:
    """One row of the table.

    Attributes:
        summary: what has the trait, for tables.
        verdicts: one word per rule, in the order of `COLUMNS`.
        says: sentence by verdict, "note" or "no", or by rule where one needs its own. Fields: {path} of what has the
            trait, {rule}, {frees} (when the rule frees its graph), and the facts of the finding.
        through_time: whether a note is about what goes from step to step, of which a single step has nothing.
    """

    summary: str
    verdicts: str
    says: dict[str, str] = field(default_factory=dict)
    through_time: bool = True

    def verdict(self, rule: str) -> str:
        """That of a column of the table."""
        return self.verdicts.split()[COLUMNS.index(rule)]

    def sentence(self, rule: str) -> str:
        """What is said where the verdict is "note" or "no"."""
        return self.says.get(rule.partition(":")[0]) or self.says[self.verdict(rule)]


class Found(NamedTuple):
    """A trait where it was found.

    Attributes:
        trait: key of `TRAITS`.
        path: of the module, or the name of what else has it.
        facts: further fields of the sentence.
        cause: path of what makes it so; nothing is said if that is refused for a reason of its own.
    """

    trait: str
    path: str
    facts: tuple[tuple[str, str], ...] = ()
    cause: str | None = None


TRAITS: dict[str, Trait] = {
    # trait                                      sltt sltt_k ottt ndot tbptt rate rate:sequence
    "sequence_norm": Trait(
        "norm with statistics of all steps (`bn`, `tdbn`), in training",
        "no no no no no no yes",
        {
            "no": "{path} is {kind} and needs all T steps; {rule} {frees}. Use StepBatchNorm, OnlineRenorm or "
            "weight standardisation (norm=step_bn, osr or ws), model.eval() for running statistics, or an exact "
            "strategy such as checkpoint.",
            "rate": "{path} is {kind} and needs all T steps; {rule} {frees}. Use rate(mode='sequence') "
            "(strategy=rate:sequence), or StepBatchNorm or weight standardisation (norm=step_bn or ws).",
        },
    ),
    "step_norm": Trait(
        "norm with statistics of each step (`step_bn`, `osr`), in training",
        "yes yes note note yes yes yes",
        {
            "note": "{path} is {kind} with statistics of each step, which traces pass only approximately: {rule} gives "
            "approximate gradients of the weights in front of it. Weight standardisation (norm=ws) passes them exactly."
        },
    ),
    "foreign_norm": Trait(
        "norm with an arithmetic of its own (`osr`)",
        "yes yes yes yes yes no no",
        {
            "no": "{path} is {kind}, and expected is a BatchNorm or StepBatchNorm, whose statistics are known in "
            "rates. Use norm=step_bn, ws or none, or sltt."
        },
    ),
    "whole_loss": Trait(
        "loss that needs the logits of all steps at once (`ce_mean`, `rate_mse`, `ce_heads`)",
        "no no no no no yes yes",
        {
            "no": "{path} needs the logits of all steps at once; {rule} {frees}. Use TET or CrossEntropySteps "
            "(loss=tet or ce_steps)."
        },
    ),
    "loss_beyond_mean": Trait(
        "loss that reads more than the mean of the logits over time (`ce_steps`, `tet`, `ce_heads`)",
        "yes yes yes yes yes no no",
        {
            "no": "{path} reads more than the mean of the logits over time, and rates give no more. Use "
            "CrossEntropyMean or RateMSE (loss=ce_mean or rate_mse), or sltt."
        },
    ),
    "whole_neuron": Trait(
        "neuron that sees several steps at once (`stepwise = False`)",
        "no no no no no no no",
        {
            "no": "{path} is {kind}, which sees several steps at once, and there is no membrane to carry from step to "
            "step. Use a neuron with a membrane (neuron=lif), or an exact strategy such as bptt or checkpoint."
        },
    ),
    "consumes_time": Trait(
        "layer over time (`consumes_time = True`)",
        "no no no no no no no",
        {
            "no": "{path} is {kind} and needs all time steps at once; {rule} {frees}. Use layers that work step by "
            "step, or an exact strategy such as checkpoint or lean."
        },
    ),
    "no_step": Trait(
        "model without `init_state` and `step`",
        "no no no no no no no",
        {
            "no": "{path} has no init_state and step, so it cannot run step by step. Give the "
            "model inside a data-parallel wrapper, or build it as spikefit.SpikingNetwork([...]) or with "
            "spikefit.create_model(...)."
        },
    ),
    "no_state": Trait(
        "block without `init_state`",
        "no no no no no no no",
        {
            "no": "{path} is {kind} without init_state, so no one knows what it carries from step to step. Give it an "
            "init_state(batch_size, shape) that returns (state, shape of an output sample)."
        },
    ),
    "late_readout": Trait(
        "model with logits at some steps only (`reads_out_every_step = False`)",
        "no no no no no no no",
        {
            "no": "{path} has a read-out at some steps only, and {rule} needs logits of every step. Use an exact "
            "strategy such as step_checkpoint or reversible."
        },
    ),
    "other_length": Trait(
        "model made for another number of steps (T = 1 for `dmsn_cnn12`)",
        "no no no no no no no",
        {
            "no": "{path} was made for T = {length}, got T = {timesteps}. Give it as many steps "
            "(encoding.timesteps={length}), or make it for these."
        },
    ),
    "own_model": Trait(
        "model that is no `SpikingNetwork`, or runs its blocks in its own way",
        "yes yes yes no yes no no",
        {
            "ndot": "{path} is not run as a SpikingNetwork, so no one can tell which neuron a synapse reads from. "
            "Build it as spikefit.SpikingNetwork([...]), or use ottt.",
            "rate": "{path} is not run as a SpikingNetwork, so no one can tell what is linear in rates. Build it as "
            "spikefit.SpikingNetwork([...]), or use sltt.",
        },
    ),
    "foreign_block": Trait(
        "block that is no unit, residual block, read-out, flatten, dropout or average pool",
        "yes yes yes no yes no no",
        {
            "ndot": "{path} reads from {told}, behind which no neuron can be told for each input. Use units and "
            "residual blocks in a plain chain, or ottt.",
            "rate": "{path} is {kind}, which is not known to be linear in rates. Use units, residual blocks and "
            "average pools in its place, or another rule, such as sltt.",
        },
    ),
    "lateral": Trait(
        "block that reads its own output of the step before (`lateral = True`)",
        "note note no no yes no no",
        {
            "note": "{path} reads its own output of the step before, and {rule} drops that path from the gradient. Use "
            "tbptt or an exact strategy to keep it.",
            "no": "{path} reads its own output of the step before, and traces do not follow that path. Use sltt, which "
            "drops it, or tbptt.",
            "rate": "{path} reads its own output of the step before, which is not linear in rates. Use sltt or tbptt.",
        },
    ),
    "product": Trait(
        "product of two activations (attention; `multiplies_activations = True`)",
        "yes yes no no yes no no",
        {
            "no": "{path} is {kind} and multiplies two activations, and a trace of one knows nothing of the other. Use "
            "sltt or tbptt, which need no traces.",
            "rate": "{path} is {kind} and multiplies two activations, which is not linear in rates. Use sltt or tbptt.",
        },
    ),
    "max_pool": Trait(
        "max pool",
        "yes yes yes no yes no no",
        {
            "ndot": "no neuron can be told behind the max pool of {path} for each input of a synapse. Use pool='avg', "
            "or ottt.",
            "rate": "the max pool of {path} is not linear in rates. Use pool='avg', or sltt.",
        },
    ),
    "leaky_readout": Trait(
        "read-out with a membrane (`head_tau`)",
        "note note note note yes no no",
        {
            "note": "{path} carries logits from step to step (tau={tau}), a path that {rule} cuts: gradients below the "
            "read-out are not exact. Use Readout(..., tau=None) (head_tau=None) for one without a membrane.",
            "no": "{path} weighs steps differently (tau={tau}), and a rate has no steps. Use a read-out without a "
            "membrane, Readout(..., tau=None) (head_tau=None), or sltt.",
        },
    ),
    "hard_reset": Trait(
        "neuron with a hard reset",
        "yes yes note no yes yes yes",
        {
            "note": "{path} has a hard reset, and {rule} equals BPTT, in the last spiking layer, for a soft, detached "
            "reset only. Use v_reset=None (neuron.v_reset=soft) where the recipe allows it.",
            "no": "{path} has a hard reset, and {rule} needs a soft reset for the ratio of two membranes. Use "
            "v_reset=None (neuron.v_reset=soft), or ottt or sltt.",
        },
    ),
    "attached_reset": Trait(
        "neuron with an attached soft reset (`detach_reset=False`)",
        "yes yes note yes yes yes yes",
        {
            "note": "{path} has an attached reset, and {rule} equals BPTT, in the last spiking layer, for a soft, "
            "detached reset only. Use detach_reset=True where the two are compared."
        },
    ),
    "grid": Trait(
        "membrane on a grid (`frac_bits`)",
        "yes yes yes no yes no no",
        {
            "ndot": "{path} has a membrane on a grid (frac_bits={bits}), where the ratio of two membranes means "
            "nothing. Leave out frac_bits, or use ottt or sltt.",
            "rate": "{path} has a membrane on a grid (frac_bits={bits}), where rounding hides how rates depend on the "
            "input. Leave out frac_bits, or use sltt.",
        },
    ),
    "learned_leak": Trait(
        "neuron that learns its leak (`plif`)",
        "note note yes yes yes no no",
        {
            "note": "{path} is {kind}, which learns its leak, and {rule} keeps the immediate term of its gradient "
            "alone. Use ottt for all of it, or a fixed leak (neuron=lif).",
            "no": "{path} is {kind}, which learns its leak, and rates carry no gradient to it. Use a fixed leak "
            "(neuron=lif), freeze the neuron with requires_grad_(False), or use ottt.",
        },
    ),
    "own_membrane": Trait(
        "neuron without one leak per step (`two_group`, groups of channels)",
        "yes yes no no yes no no",
        {
            "no": "{path} is {kind} with {what}, and expected is a neuron whose membrane keeps one leak per step. Use "
            "another neuron, or sltt."
        },
    ),
    "shared_membrane": Trait(
        "layers or channels that use one membrane (`share`)",
        "yes yes no no yes no no",
        {
            "no": "{path} has share={share!r}, where no single leak leads from one step to the next. Use share='none', "
            "or sltt."
        },
    ),
    "chain_strategy": Trait(
        "strategy of a chain (`checkpoint`, `reversible`, ...)",
        "yes yes no no yes no no",
        {
            "no": "{path} has strategy={strategy!r}, whose backward runs units again, past the traces. Call "
            "use_strategy(model, 'lean') or 'bptt' (strategy.inside=lean, bptt), or use sltt; {rule} holds nothing "
            "that grows with T.",
            "rate": "{path} has strategy={strategy!r}, whose backward runs units again, on rates as if they were "
            "spikes. Call use_strategy(model, 'bptt') (strategy.inside=bptt), or use sltt; {rule} holds nothing that "
            "grows with T.",
        },
    ),
    "lean_unit": Trait(
        "unit under strategy `lean`",
        "yes yes yes yes yes no no",
        {
            "rate": "{path} runs lean, and its backward would rebuild membranes of spikes, not of rates. Call "
            "use_strategy(model, 'bptt') (strategy.inside=bptt), or use sltt.",
        },
    ),
    "untraced": Trait(
        "trained parameter outside of units with neurons",
        "yes yes no no yes yes yes",
        {
            "no": "{path} is trained and belongs to no synapse that feeds known neurons, to no norm behind one and to "
            "no neuron, so it would get a gradient without its trace. Build the block from units with neurons, freeze "
            "the parameter, or use sltt."
        },
    ),
    "no_first_synapse": Trait(
        "`trace_first=False` where no unit is known to read the data",
        "yes yes no no - - -",
        {
            "no": "trace_first=False leaves the synapse that reads the data without a trace, and none was found in "
            "{path}. Put it into a unit of a SpikingNetwork, or use trace_first=True."
        },
    ),
    "top_activity": Trait(
        "sampler `TopActivity`",
        "- no no no - - -",
        {
            "no": "{path} ranks the steps of a whole sequence by activity, which {rule} cannot know in advance, as it "
            "{frees}. Use look_ahead=True, which runs the forward twice, or RandomK or EveryK."
        },
    ),
    "look_ahead": Trait(
        "the same with `look_ahead=True`",
        "- note note note - - -",
        {
            "note": "{path} runs each sequence twice, the first time without a graph, to count its spikes. Use "
            "RandomK or EveryK for one run."
        },
        through_time=False,
    ),
    "too_short": Trait(
        "sequence with fewer steps than are to be chosen",
        "- no no no - - -",
        {
            "no": "{path} needs a sequence of at least {least} steps for {rule}, got {timesteps}. Choose fewer "
            "(strategy=sltt_k:1), or use all (strategy=sltt)."
        },
    ),
    "update_every_step": Trait(
        '`update_every="step"` on several processes',
        "note note note note note - -",
        {
            "note": "{path} on {world_size} processes means one all-reduce, and one tick of the optimiser, per step in "
            "the place of one per batch. Use update_every='sequence' unless that is meant."
        },
        through_time=False,
    ),
    "one_step": Trait(
        "one time step (T = 1)",
        "note note note note note note note",
        {
            "note": "{path} is one time step, where every rule gives the gradient of BPTT. Use the cheapest, which is "
            "bptt without a rule."
        },
        through_time=False,
    ),
}


def verdict_rows() -> list[dict[str, str]]:
    """The whole table: per trait its name, its summary and a verdict for every rule of `COLUMNS`."""
    return [
        {"name": name, "summary": trait.summary, **{rule: trait.verdict(rule) for rule in COLUMNS}}
        for name, trait in TRAITS.items()
    ]


def markdown() -> str:
    """The table as the docs have it."""
    lines = [" | ".join(("", "what", *COLUMNS, "")), " | ".join(("", *["---"] * (len(COLUMNS) + 1), ""))]
    lines += [" | ".join(("", row["summary"], *(row[rule] for rule in COLUMNS), "")) for row in verdict_rows()]
    return "\n".join(line.strip() for line in lines)
