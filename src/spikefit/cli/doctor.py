"""`spikefit doctor`: three training steps of a target on random input, and what lives longer than a step."""

from typing import Annotated, Any

import typer


def doctor_command(
    target: Annotated[str, typer.Argument(help="model, recipe file, or package.module:factory")],
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="settings, with the keys of a recipe")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """Forgotten resets, kept graphs, growing lists: spikefit doctor mynet:make timesteps=4 batch=8 image=2x16x16.

    A model of your own takes [T, B, ...] and gives logits [T, B, K]; if it has a reset(), that is called before every
    step.
    """
    from spikefit.cli.app import print_json, read_pairs

    found = doctor_target(target, read_pairs(pairs))
    if as_json:
        return print_json(found.to_dict())
    print(found)


def doctor_target(target: str, changes: dict[str, str]) -> Any:
    """Run `doctor` over three SGD steps of `target` on random input of the right shape; keys as in a recipe.

    Raises:
        OptionError: no such target, or its input shape or time steps are not known.
        Exception: what the model raises.
    """
    import torch  # here and below, because `spikefit --help` needs none of it

    from spikefit.cli.targets import read_recipe
    from spikefit.errors import OptionError
    from spikefit.ops.dispatch import use_backend
    from spikefit.planning import random_sample
    from spikefit.planning.doctor import doctor
    from spikefit.planning.target import training_step
    from spikefit.training import build_loss

    recipe = read_recipe(target, changes)
    model, loss = _model(recipe).train(), build_loss(recipe)
    shape = getattr(model, "input_shape", None) or recipe.model.input_shape
    timesteps = getattr(model, "timesteps", None) or recipe.encoding.timesteps
    if shape is None or timesteps is None:
        raise OptionError(f"doctor: {target} does not say what it takes; give image=CxHxW or shape=C, and timesteps=T.")
    repeated = len(shape) == 3 and recipe.encoding.name == "repeat"
    x, y = random_sample(tuple(shape), timesteps, recipe.data.batch_size, repeated=repeated)
    if recipe.train.precision == "64-true":
        model, x = model.double(), x.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        if callable(getattr(model, "reset", None)):
            model.reset()
        optimizer.zero_grad()
        training_step(model, x, y, loss, autocast=recipe.train.precision == "bf16-mixed")
        optimizer.step()

    with use_backend(recipe.backend):
        return doctor(model, step)


def _model(recipe: Any) -> Any:
    """The model of a recipe; unlike for training, a factory may return any torch module."""
    from spikefit.models import use_strategy
    from spikefit.planning import Target
    from spikefit.training import build_model

    if ":" not in recipe.model.name:
        return build_model(recipe)
    options = {k: v for k, v in recipe.model.options().items() if k != "input_shape"}
    model = Target(recipe.model.name, options=options).build()
    return model if recipe.strategy.name == "bptt" else use_strategy(model, recipe.strategy.model_dump())
