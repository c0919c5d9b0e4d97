"""`torch.library.custom_op`, at the price of a plain function call where nothing watches.

torch's way through its dispatcher costs about 0.1 ms per call and as much again in backward. A sequence pays that once
per layer; a rule that runs step by step pays it T times.
"""

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import Function


def custom_op(name: str) -> Callable[[Callable[..., Any]], "CustomOp"]:
    """Make the decorated function, which changes none of its arguments, the operator `name`, "spikefit::...".

    Its signature follows the rules of torch.library.custom_op.
    """
    return lambda values: CustomOp(name, values)


class CustomOp:
    """An operator that compilers, predictions and counts see by its name; where there are none, the function itself.

    Both ways run the same functions, forward and backward, so results and gradients agree bit for bit.
    """

    def __init__(self, name: str, values: Callable[..., Any]):
        self.name = name
        self._values = values
        self._op = torch.library.custom_op(name, values, mutates_args=())
        self._direct: type[Function] | None = None
        hints = get_type_hints(values)
        hints.pop("return")
        self._exact = [_exact(hint) for hint in hints.values()]

    def __call__(self, *args):
        """The results of the function, with the gradient given to `register_autograd`."""
        if _watched():
            return self._op(*args)
        graph = False
        for a, types in zip(args, self._exact, strict=True):
            if type(a) not in types:
                return self._op(*args)
            if isinstance(a, Tensor):
                # what torch would write out first
                if a.is_neg() or a._is_zerotensor():
                    return self._op(*args)
                graph = graph or a.requires_grad
        if not (graph and torch.is_grad_enabled()):
            return self._values(*args)
        # an operator without a gradient says so in backward
        return self._op(*args) if self._direct is None else self._direct.apply(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As in torch.library: the function that gives shapes without values."""
        return self._op.register_fake(fake)

    def register_autograd(
        self, gradient: Callable[..., Any], *, setup_context: Callable[..., None] = lambda ctx, inputs, output: None
    ) -> None:
        """As in torch.library: `setup_context(ctx, inputs, output)` keeps what `gradient(ctx, *g)` needs."""
        self._op.register_autograd(gradient, setup_context=setup_context)
        values = self._values

        def forward(ctx, *args):
            output = values(*args)
            setup_context(ctx, args, output)
            return output

        # graphs and profilers show its name
        self._direct = type(
            self.name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
        )


def _exact(hint: Any) -> frozenset[type]:
    """The types an argument may have without a conversion; a list, whose graph would not be found, has none of them."""
    types = {t for t in get_args(hint) or (hint,) if isinstance(t, type)}
    return frozenset(types | {torch.nn.Parameter} if Tensor in types else types)


def _watched() -> bool:
    """Whether a compiler, a mode or a transform has to see the operator instead of what it does."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    )
