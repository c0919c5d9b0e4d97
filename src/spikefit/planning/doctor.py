"""`doctor`: run a training step a few times and find what lives longer than a step.

Nodes of an autograd graph are numbered in the order they are made. So a number tells which step made a node without
holding it, and a graph has leaked if tensors that are alive after a later step still reach it.

The file is long because five searches share one run. From top to bottom: what stands on the modules between two steps
(`_scan`), the graph (`_reach`), a step under watch (`_Watch`), then the searches.
"""

import gc
import inspect
import weakref
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikefit.errors import OptionError

OUTSIDE = "outside of the model"

# Host memory of a node of a graph without its tensors, rounded down: 570 B for add, 650 B for mul with torch 2.13.
NODE_BYTES = 512

# How torch words the error that a mistake leads to; then the finding is the answer, and the error ends the run.
SYMPTOMS = {
    "forgotten reset": ("backward through the graph a second time", "modified by an inplace operation"),
    "stale batch": ("size", "shape"),
}

RESETS = ("reset", "reset_mem", "reset_state", "reset_states")
OVERWRITES = {"aten::zero_", "aten::fill_", "aten::copy_", "aten::normal_", "aten::uniform_", "aten::bernoulli_"}

Key = tuple[str, str]  # path of a module, and the attribute, buffer or entry of it


@dataclass(frozen=True)
class Finding:
    """One mistake.

    Attributes:
        module: path of the module as in `named_modules` ("" is the model itself), or "outside of the model".
        kind: "forgotten reset", "stale batch", "kept graph", "growing container" or "class registry".
        where: the attribute, entry or variable.
        bytes_per_step: what a step carries on, keeps or adds.
        bytes_total: the same over the steps that were run.
        evidence: what was seen.
        line: the line of code to write, `model` being what was handed in.
    """

    module: str
    kind: str
    where: str
    bytes_per_step: int
    bytes_total: int
    evidence: str
    line: str


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; iterates and counts like the list of its findings.

    Attributes:
        findings: one per mistake; none for a clean loop.
        steps: how many steps ran to their end.
        error: the error that ended the step after them, if a finding explains it.
    """

    findings: list[Finding]
    steps: int
    error: str | None = None

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"doctor: {len(self) or 'nothing'} found; complete steps: {self.steps}."]
        if self.error is not None:
            lines.append(f"Step {self.steps + 1} ended with what this leads to, {self.error.partition('. ')[0]}.")
        for i, f in enumerate(self.findings, 1):
            lines += [f"{i}. {f.module or 'the model itself'}, {f.kind}: {f.evidence}."]
            lines += [f"   {f.bytes_per_step:,} B per step, {f.bytes_total:,} B in all. Write:", f"       {f.line}"]
        return "\n".join(lines)


def doctor(model: nn.Module, step: Callable[[], object], n: int = 3) -> Diagnosis:
    """Run `step` n times and find state, graphs and lists that live longer than a step.

    The steps are real: weights, optimiser, random numbers and state are left as n plain calls of `step` leave them.
    Hooks are on the modules during the call only.

    Args:
        model: any module, of this or another library.
        step: one whole training step in your own code: forward, loss, backward, optimiser, reset. What it returns is
            dropped.
        n: number of steps, at least 2; with 2, a graph kept once looks like one kept every step.

    Returns:
        Diagnosis of five kinds of findings:
            forgotten reset: a tensor on a module goes into the next step, with its graph or with its values.
            stale batch: the same, but made for another batch size than that of the input.
            kept graph: something outside of the modules holds the graphs of all steps before the last.
            growing container: a list, dict, set or deque (without `maxlen`) on a module has more tensors each step.
            class registry: a class attribute holds modules, graphs, or tensors that change.

    Raises:
        OptionError: `model` is no module, `step` cannot be called, or n < 2.
        Exception: whatever `step` raises, unchanged; only the error that a forgotten reset or a stale batch found in
            the same step leads to ("backward through the graph a second time") is put into `Diagnosis.error`.

    Example:
        print(doctor(net, lambda: train_on_batch(net, optimizer, x, y)))
    """
    _check(model, step, n)
    watch, scans, marks, error = _Watch(), [_scan(model)], [_mark()], None
    carried: dict[tuple[str, Key], list[_Carried]] = defaultdict(list)
    try:
        watch.open(model)
        while len(marks) <= n and error is None:
            watch.begin(len(marks), scans[-1])
            try:
                with watch:
                    step()
            except Exception as raised:
                scans.append(_scan(model))
                found = _carried_state(watch, scans, failed=True)
                if not any(c.explains(raised) for c in found):
                    raise
                error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
            else:
                scans.append(_scan(model))
                marks.append(_mark())
                found = _carried_state(watch, scans)
            for c in found:
                carried[c.kind, c.key].append(c)
    finally:
        watch.close()
    findings = _growing(scans[1 : len(marks)])
    lists = {(f.module, f.where) for f in findings}
    states = [_state_finding(model, c) for (_, key), c in carried.items() if (key[0], c[0].slot.attribute) not in lists]
    kept = _kept_graphs(step, watch, scans, marks) if error is None else []
    return Diagnosis([*states, *kept, *findings, *_registry_findings(scans)], len(marks) - 1, error)


def _check(model: Any, step: Any, n: Any) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"doctor: expected a torch module as model, got {type(model).__name__}; doctor(model, step).")
    if not callable(step):
        raise OptionError(
            f"doctor: expected step as a function without arguments that runs one training step, got "
            f"{type(step).__name__}; write doctor(model, lambda: train_on_batch(...))."
        )
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise OptionError(
            f"doctor: n must be a whole number of at least 2 steps, got {n!r}; one step cannot show growth."
        )


class _Slot(NamedTuple):
    """A tensor on a module: no hold on it, but enough to see whether it is replaced, written or used later."""

    ref: weakref.ref[Tensor]
    version: int
    storage: int
    shape: tuple[int, ...]
    bytes: int
    node: int | None  # number of its grad_fn
    attribute: str
    container: str  # class of the attribute if it is an unbounded container
    constant: bool  # the same for every sample, or a buffer that is saved: a reset value or a statistic, no state


class _Registry(NamedTuple):
    """A class attribute that holds tensors or modules."""

    module: str
    holder: type
    container: bool
    modules: int
    contents: tuple[_Slot, ...]
    bytes: int


class _Scan(NamedTuple):
    slots: dict[Key, _Slot]
    registries: dict[str, _Registry]


def _scan(model: nn.Module) -> _Scan:
    slots: dict[Key, _Slot] = {}
    registries: dict[str, _Registry] = {}
    weights = {_storage(p) for p in model.parameters() if not is_lazy(p)}
    for path, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        saved = set(buffers) - getattr(module, "_non_persistent_buffers_set", set())
        for name, value in (*buffers.items(), *vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                for where, t in _contents(value, name):
                    if isinstance(t, Tensor) and _storage(t) not in weights:
                        slots[path, where] = _slot(t, name, value, name in saved)
        for holder in type(module).__mro__:
            if holder.__module__.partition(".")[0] not in ("torch", "builtins"):
                for name, value in list(vars(holder).items()):
                    found = [item for _, item in _contents(value, name)]
                    if found and not isinstance(value, nn.Module):
                        registries.setdefault(f"{holder.__qualname__}.{name}", _registry(path, holder, value, found))
    return _Scan(slots, registries)


def _contents(value: Any, where: str, depth: int = 4) -> Iterator[tuple[str, Tensor | nn.Module]]:
    """Tensors (no parameters) and modules in `value`, with the expressions that reach them."""
    if isinstance(value, Tensor):
        own = isinstance(value, nn.Parameter) or is_lazy(value) or (value.is_leaf and value.requires_grad)
        if not own and value.layout == torch.strided and not value.is_meta:
            yield where, value
    elif isinstance(value, nn.Module):
        yield where, value
    elif depth and isinstance(value, dict):
        for key, entry in list(value.items()):
            yield from _contents(entry, f"{where}[{key!r}]", depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset | deque):
        for i, entry in enumerate(list(value)):
            yield from _contents(entry, f"{where}[{i}]", depth - 1)


def _slot(t: Tensor, attribute: str, value: Any, saved: bool = False) -> _Slot:
    bounded = isinstance(value, Tensor | tuple | frozenset) or getattr(value, "maxlen", None) is not None
    first = t[:1] if t.ndim and len(t) > 1 else t.flatten()[:1]
    return _Slot(
        ref=weakref.ref(t),
        version=0 if t.is_inference() else t._version,
        storage=_storage(t),
        shape=tuple(t.shape),
        bytes=t.untyped_storage().nbytes(),
        node=None if t.grad_fn is None else _number(t.grad_fn),
        attribute=attribute,
        container="" if bounded else type(value).__name__,
        constant=saved or (t.grad_fn is None and (t.numel() == 0 or bool((t == first).all()))),
    )


def _registry(path: str, holder: type, value: Any, found: Sequence[Tensor | nn.Module]) -> _Registry:
    modules = [m for m in found if isinstance(m, nn.Module)]
    tensors = [t for t in found if isinstance(t, Tensor)]
    held = [*tensors, *(t for m in modules for t in (*m.parameters(), *m.buffers()) if not is_lazy(t))]
    contents = tuple(_slot(t, "", value) for t in tensors)
    size = sum({_storage(t): t.untyped_storage().nbytes() for t in held}.values())
    return _Registry(path, holder, not isinstance(value, Tensor), len(modules), contents, size)


def _changed(old: _Slot | None, now: _Slot | None) -> bool:
    if old is None or now is None:
        return old is not now
    return now.ref() is not old.ref() or (now.version, now.storage) != (old.version, old.storage)


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(t)  # sparse tensors and those inside of vmap have no storage


def _number(node: Any) -> int:
    return node._sequence_nr()


def _mark() -> int:
    """A number between those of the nodes made before and after this call."""
    with torch.enable_grad():
        return _number(torch.zeros((), requires_grad=True).clone().grad_fn)


def _reach(t: Tensor, stop: set[int], seen: set[int]) -> tuple[set[int], set[int]]:
    """Numbers of the nodes that backward from `t` would visit and that are not in `seen` yet, and those of `stop`.

    The walk does not go on behind nodes of `stop`. `seen` is filled.
    """
    stack: list[Any] = [] if t.grad_fn is None else [t.grad_fn]
    first, fresh, met = _number(t.grad_fn) if stack else 0, set[int](), set[int]()
    while stack:
        node = stack.pop()
        number = _number(node)
        if number in stop and number != first:
            met.add(number)
        elif number not in seen:
            seen.add(number)
            fresh.add(number)
            stack += [following for following, _ in node.next_functions if following is not None]
    return fresh, met


class _Watch(TorchDispatchMode):
    """During a step: which slots of the step before are read in a forward, the input of each module, what is made.

    Attributes:
        read: slot -> whether it was read with its graph.
        inputs, inputs_before: path -> shape of the module's first input in this step, and in the one before.
        made: (step, storage, bytes) of every storage made in a step, as long as it is alive.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[Key, bool] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.inputs_before: dict[str, tuple[int, ...]] = {}
        self.made: list[tuple[int, weakref.ref[torch.UntypedStorage], int]] = []
        self.number = self.depth = 0
        self.slots: dict[int, list[Key]] = {}
        self.alive: list[torch.UntypedStorage] = []
        self.handles: list[Any] = []

    def open(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # they refuse hooks
                self.handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.alive.clear()

    def begin(self, number: int, scan: _Scan) -> None:
        self.number, self.depth, self.read = number, 0, {}
        self.inputs, self.inputs_before = {}, self.inputs
        self.slots = defaultdict(list)
        for key, slot in scan.slots.items():
            self.slots[slot.storage].append(key)
        # held for the time of the step, because the address of a freed storage would be given out again
        self.alive = [t.untyped_storage() for slot in scan.slots.values() if (t := slot.ref()) is not None]
        self.made = [m for m in self.made if m[1]() is not None]

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
            if given:
                self.inputs.setdefault(path, tuple(given[0].shape))
            for t in given if self.depth == 0 else ():
                self.slots.pop(_storage(t), None)  # a record of the input, which is handed in again
            self.depth += 1

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth = max(0, self.depth - 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if isinstance(func, torch._ops.OpOverload) and not func.is_view:
            self._note(func._schema.name, given)
        out = func(*args, **(kwargs or {}))
        known = {_storage(t) for t in given}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.layout == torch.strided and _storage(t) not in known:
                storage = t.untyped_storage()
                self.made.append((self.number, weakref.ref(storage), storage.nbytes()))
        return out

    def _note(self, name: str, given: list[Tensor]) -> None:
        if name.endswith("_like") or name.startswith("aten::new_"):
            return  # only the shape is read
        if name in OVERWRITES and given:
            self.slots.pop(_storage(given[0]), None)
            given = given[1:]
        for t in given if self.depth else ():
            for key in self.slots.get(_storage(t), ()):
                self.read[key] = self.read.get(key, False) or t.requires_grad


class _Carried(NamedTuple):
    """A slot of the step before that a step used."""

    kind: str
    key: Key
    slot: _Slot
    number: int
    attached: bool
    batch: tuple[int, ...] | None

    def explains(self, error: Exception) -> bool:
        return (self.attached or self.kind == "stale batch") and any(s in str(error) for s in SYMPTOMS[self.kind])


def _carried_state(watch: _Watch, scans: list[_Scan], failed: bool = False) -> list[_Carried]:
    """The slots of `scans[-2]` that went into the step before `scans[-1]`, each storage once."""
    before, after = scans[-2].slots, scans[-1].slots
    changed = {key for key in (*before, *after) if _changed(before.get(key), after.get(key))}
    nodes, seen, reached = {slot.node for slot in before.values() if slot.node is not None}, set[int](), set[int]()
    for key in changed & after.keys():
        t = after[key].ref()
        if t is not None and t.grad_fn is not None:
            reached |= _reach(t, nodes, seen)[1] | {_number(t.grad_fn)}
    found: dict[int, _Carried] = {}
    # of several slots with one storage, the one on the innermost module counts
    for key, slot in sorted(before.items(), key=lambda e: (bool(e[1].container), -e[0][0].count("."), not e[0][0])):
        attached = slot.node in reached or watch.read.get(key, False)
        if not attached and not (key in watch.read and (key in changed or failed)):
            continue
        x, x_before = _input(watch.inputs, key[0]), _input(watch.inputs_before, key[0])
        resized = attached or failed or key not in after or after[key].shape != slot.shape
        if _stale(slot, x, x_before, resized) and (attached or not slot.constant):
            kind = "stale batch"
        elif attached or (_per_sample(slot, x) and len(scans) > 2 and _changed(scans[-3].slots.get(key), slot)):
            kind = "forgotten reset"
        else:
            continue
        found.setdefault(slot.storage, _Carried(kind, key, slot, watch.number, attached, x))
    return list(found.values())


def _input(inputs: dict[str, tuple[int, ...]], path: str) -> tuple[int, ...] | None:
    """Shape of the input of a module, or of the nearest module around it that was called."""
    while path and path not in inputs:
        path = path.rpartition(".")[0]
    return inputs.get(path)


def _fits(shape: tuple[int, ...], x: tuple[int, ...]) -> bool:
    """Whether the batch of a state is that of an input; either may have a time axis in front."""
    return bool(set(shape[: max(1, len(shape) - len(x) + 1)]) & set(x[: max(1, len(x) - len(shape) + 1)]))


def _per_sample(slot: _Slot, x: tuple[int, ...] | None) -> bool:
    """Whether a slot without a graph looks like the state of a batch, not like a statistic or a reset value."""
    return x is not None and not slot.constant and (slot.shape == x or (len(slot.shape) > 1 and _fits(slot.shape, x)))


def _stale(slot: _Slot, x: tuple[int, ...] | None, x_before: tuple[int, ...] | None, resized: bool) -> bool:
    if x is None or len(slot.shape) < 2 or _fits(slot.shape, x):
        return False
    same_features = slot.shape[1:] == x[len(x) - len(slot.shape) + 1 :]
    return (x_before is not None and _fits(slot.shape, x_before)) or (same_features and resized)


def _state_finding(model: nn.Module, carried: list[_Carried]) -> Finding:
    c = carried[0]
    path, where = c.key
    what = "with the graph of the step before" if c.attached else "with the values of the step before, without a graph"
    evidence = f"{where} of shape {c.slot.shape} goes into step {c.number} {what}"
    if c.kind == "stale batch":
        evidence += f", while the input has shape {c.batch}"
    times = len(carried) if c.attached else 1
    return Finding(path, c.kind, where, c.slot.bytes, times * c.slot.bytes, evidence, _reset_line(model, c))


def _reset_line(model: nn.Module, c: _Carried) -> str:
    path, where = c.key
    module, owner = model.get_submodule(path), _expression(path)
    rooms = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    reset = next((name for name in RESETS if callable(getattr(module, name, None))), None)
    when = "# before every step"
    if not c.attached and c.kind == "forgotten reset":
        when += ", unless the batch goes on with the sequences of the one before"
    if "spikingjelly" in rooms:
        return f"functional.reset_net(model)  {when}"
    if reset is not None:
        return f"{owner}.{reset}()  {when}"
    if c.kind == "stale batch" and c.batch is not None:
        axis = max(0, len(c.batch) - len(c.slot.shape))
        sizes = ", ".join(map(str, (c.batch[axis], *c.slot.shape[1:])))
        return f"{owner}.{where} = {owner}.{where}.new_zeros({sizes})  {when}, with the batch of the input"
    return f"{owner}.{where} = torch.zeros_like({owner}.{where})  {when}"


def _expression(path: str) -> str:
    """Python for the module at `path`: "blocks.0.lif" -> "model.blocks[0].lif"."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".") if part)


def _growing(scans: list[_Scan]) -> list[Finding]:
    """Containers with more tensors after each step, some of them those of earlier steps."""
    groups: list[dict[Key, list[_Slot]]] = []
    for scan in scans:
        groups.append(defaultdict(list))
        for (path, _), slot in scan.slots.items():
            if slot.container:
                groups[-1][path, slot.attribute].append(slot)
    findings = []
    for key, slots in groups[-1].items() if len(scans) > 1 else ():
        counts = [len(group.get(key, ())) for group in groups]
        now = {id(s.ref()) for s in slots}
        old = [{id(t) for s in group.get(key, ()) if (t := s.ref()) is not None} for group in groups[:-1]]
        if all(a < b for a, b in pairwise(counts)) and all(ids & now for ids in old):
            first, last = _bytes(groups[0][key]), _bytes(slots)
            graphs = sum(s.node is not None for s in slots)
            evidence = f"the {slots[0].container} {key[1]} has {', '.join(map(str, counts))} tensors after the steps"
            evidence += f", {graphs} of them with their graph" if graphs else ""
            line = f"{_expression(key[0])}.{key[1]}.clear()  # before every step; and keep t.detach(), not t"
            growth = (last - first) // (len(counts) - 1)
            findings.append(Finding(key[0], "growing container", key[1], growth, last, evidence, line))
    return findings


def _bytes(slots: Sequence[_Slot]) -> int:
    return sum({s.storage: s.bytes for s in slots}.values())


def _registry_findings(scans: list[_Scan]) -> list[Finding]:
    findings = []
    for where, now in scans[-1].registries.items():
        then = scans[1].registries.get(where)
        old = then.contents if then else ()
        graphs = sum(s.node is not None for s in now.contents)
        moved = len(old) != len(now.contents) or any(map(_changed, old, now.contents))
        if not now.modules and not graphs and not moved:
            continue
        evidence = f"the class attribute {where} holds {now.modules} modules and {len(now.contents)} tensors"
        evidence += f" ({graphs} with their graph), which outlive the model and are shared with every other one"
        attribute = where.rpartition(".")[2]
        line = f"self.{attribute} = None  # in {now.holder.__name__}.__init__: one per module, not one per class"
        if now.container:
            owner = f"type({_expression(now.module)}).{attribute}"
            line = f"{owner}.clear()  # before a model is built; or make it in __init__: one per module"
        growth = (now.bytes - (then.bytes if then else 0)) // max(1, len(scans) - 2)
        findings.append(Finding(now.module, "class registry", where, growth, now.bytes, evidence, line))
    return findings


def _kept_graphs(step: Callable[[], object], watch: _Watch, scans: list[_Scan], marks: list[int]) -> list[Finding]:
    """Graphs of earlier steps that tensors outside of the modules and their classes hold; at most one finding."""
    n = len(marks) - 1
    on_modules = [*scans[-1].slots.values(), *(s for r in scans[-1].registries.values() for s in r.contents)]
    owned = [t for s in on_modules if (t := s.ref()) is not None]
    gc.collect()
    objects = gc.get_objects()
    live = [t for t in objects if issubclass(type(t), Tensor)]
    # what the modules hold is another finding, together with the tensors that its graph keeps
    seen: set[int] = set()
    for t in owned:
        _reach(t, set(), seen)
    roots = [t for t in live if t.grad_fn is not None and _number(t.grad_fn) not in seen]
    nodes: Counter[int] = Counter()
    holders = []
    for t in sorted(roots, key=lambda t: -_number(t.grad_fn)):
        made_in = [bisect_right(marks, number) for number in _reach(t, set(), seen)[0]]
        old = [number for number in made_in if 1 <= number < n]
        nodes.update(old)
        holders += [t] if old else []
    if len(nodes) < n - 1:
        return []
    # not by a graph is held: what is on the modules, gradients, and what Python refers to and has no graph (optimiser)
    python = {id(r) for o in objects for r in gc.get_referents(o) if issubclass(type(r), Tensor)}
    others = {_storage(t) for t in live if t.grad_fn is None and id(t) in python} | {s.storage for s in on_modules}
    others |= {_storage(t.grad) for t in live if t.is_leaf and t.requires_grad and t.grad is not None}
    made = {s._cdata: size for number, ref, size in watch.made if number < n and (s := ref()) is not None}
    tensors = sum(size for storage, size in made.items() if storage not in others)
    total = tensors + NODE_BYTES * nodes.total()
    where, line = _holder(step, holders)
    evidence = (
        f"after step {n} the graphs of all steps before are alive, {nodes.total()} nodes of about {NODE_BYTES} B and "
        f"{tensors:,} B of tensors, held by {where}"
    )
    return [Finding(OUTSIDE, "kept graph", where, total // (n - 1), total, evidence, line)]


def _holder(step: Callable[[], object], holders: list[Tensor]) -> tuple[str, str]:
    """Names of what holds the tensors, as far as `step` sees them, and the line to write."""
    wanted = {id(t) for t in holders}
    names = {}
    for name, value in _scope(step).items():
        entries = [entry for _, entry in _contents(value, name)]
        if any(id(entry) in wanted for entry in entries):
            names[name] = isinstance(value, Tensor)
    if names:
        name, is_tensor = next(iter(names.items()))
        line = f"{name} += loss.item()" if is_tensor else f"{name}.append(y.detach())"
        return ", ".join(names), f"{line}  # where {name} is updated; .detach() or .item() lets the graph go"
    t = holders[0]
    where = f"a tensor of shape {tuple(t.shape)} made by {t.grad_fn.name() if t.grad_fn else 'no node'}"
    return where, "kept = y.detach()  # where it is stored; or loss.item() for a number"


def _scope(step: Any) -> dict[str, Any]:
    """Variables that `step` uses: of the functions around it, of its module, and attributes of its object."""
    function = inspect.unwrap(getattr(step, "func", step))
    owner = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function, owner = vars(type(function)).get("__call__"), function
    found: dict[str, Any] = {}
    if inspect.isfunction(function):
        code, cells = function.__code__, function.__closure__ or ()
        found = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
        for name, cell in zip(code.co_freevars, cells, strict=True):
            if cell != type(cell)():  # an empty cell has no contents
                found[name] = cell.cell_contents
    for prefix, thing in [("self", owner), *found.items()]:
        if hasattr(thing, "__dict__") and not isinstance(thing, nn.Module | type | type(inspect)):
            found = found | {f"{prefix}.{name}": value for name, value in vars(thing).items()}
    return found
