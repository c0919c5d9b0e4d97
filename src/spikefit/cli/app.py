"""The verbs. Each reads its words, calls one function of the library and prints the result; rooms load when needed."""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spikefit.cli import missing
from spikefit.errors import OptionError, RuleWarning, SpikefitError

# wherever the installed typer keeps its parser, this is the base of its complaints about the words of a command
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="spikefit",
    help="Train any spiking neural network in the memory you have.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="settings, with the keys of a recipe")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON only")]
Out = Annotated[Path | None, typer.Option("--out", help="folder for what is written")]
Debug = typer.Option("--debug", help="show the traceback of an error (may stand anywhere)")


class Stopped(Exception):
    """Stopped by hand; the message says what is left and how to go on."""


@contextmanager
def tells_what_is_left(sentence: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C inside the block into `Stopped` with `sentence()`."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; {sentence()}") from None


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 fine, 1 an error of the program, 2 of the input, 130 stopped by hand."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in words
    sys.exit(_run([w for w in words if w != "--debug"], debug))


def _run(words: list[str], debug: bool) -> int:
    warnings.showwarning = _show_warning
    try:
        code = int(app(args=words or ["--help"], prog_name="spikefit", standalone_mode=False) or 0)
        # typer turns Ctrl-C into this number and says nothing
        return _say("stopped; nothing was written.", code) if code == 130 else code
    except Stopped as error:
        return _say(str(error), 130)
    except UsageError as error:
        return _say(f"{error.format_message()} See spikefit --help.", 2)
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _say("stopped; nothing was written.", 130)
    except BrokenPipeError:
        # the reader of a pipe went away; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SpikefitError as error:
        if debug:
            raise
        return _say(str(error), 2)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and (sentence := missing(error)):
            return _say(sentence, 1)
        return _say(f"{type(error).__name__}: {error}. Run again with --debug to see where it happened.", 1)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """One line for a note of a rule; all other warnings as Python shows them."""
    if issubclass(category, RuleWarning):
        print(f"spikefit: note: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)


def _say(sentence: str, code: int) -> int:
    # an error that lists several reasons has a line for each
    lines = [" ".join(line.split()) for line in sentence.split("\n- ")]
    print("spikefit: " + "\n- ".join(lines), file=sys.stderr)
    return code


def read_pairs(pairs: list[str] | None) -> dict[str, str]:
    """["a=1", "b.c=x"] as a dictionary.

    Raises:
        OptionError: a word without "=", or a key given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"expected settings as key=value, got {pair!r}; for example timesteps=8 or lr=0.1.")
        if key.strip() in found:
            raise OptionError(f"the key {key.strip()!r} is given twice; keep one.")
        found[key.strip()] = value
    return found


def print_json(value: Any) -> None:
    """Print `value` as JSON; numbers that are not finite become null."""
    print(json.dumps(_finite(value), indent=1))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _is_first_process() -> bool:
    """Whether this process prints; a training on several devices runs the command in each of them."""
    import torch.distributed as processes

    return not (processes.is_available() and processes.is_initialized() and processes.get_rank() > 0)


def _version(wanted: bool) -> None:
    if wanted:
        from spikefit import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, Debug] = False,
) -> None:
    """Train any spiking neural network in the memory you have.

    TARGET is a model (vgg9), a recipe file (recipes/demo.toml) or package.module:factory for a model of your own.
    """


@app.command()
def train(
    target: Annotated[str, typer.Argument(help="recipe file, or a model with data=...")],
    pairs: Pairs = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on at the last checkpoint in --out")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model: spikefit train recipes/demo.toml epochs=3 --out runs/first."""
    from spikefit.cli.targets import read_recipe
    from spikefit.training import latest, train

    def left() -> str:
        if out is None:
            return "nothing is saved, because there was no --out."
        newest = latest(out)
        if newest is None:
            return f"before the first checkpoint, so nothing is saved in {out}; the same command starts again."
        return f"{newest} is saved; the same command with --resume goes on there."

    recipe = read_recipe(target, read_pairs(pairs))
    if resume and out is None:
        raise OptionError("train: --resume goes on with the run in a folder; give it with --out.")
    with tells_what_is_left(left):
        record = train(recipe, out=out, resume=resume, progress=True).to_dict()
    if not _is_first_process():
        return None
    if as_json:
        return print_json(record)
    from spikefit.cli.show import show_record

    show_record(record)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint, or the --out folder of train")],
    pairs: Pairs = None,
    split: Annotated[str, typer.Option(help="test or train")] = "test",
    as_json: AsJson = False,
) -> None:
    """Accuracy of trained weights: spikefit evaluate runs/first."""
    from spikefit.cli.targets import checkpoint_recipe
    from spikefit.training import evaluate

    changes = read_pairs(pairs)
    result = evaluate(checkpoint, checkpoint_recipe(checkpoint).override(changes) if changes else None, split=split)
    if as_json:
        return print_json(result)
    from spikefit.cli.show import show_evaluation

    show_evaluation(result)


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint, or the --out folder of train")],
    file: Annotated[Path, typer.Argument(help="samples: .npy, .npz, an image, or a .bin of events")],
    as_json: AsJson = False,
) -> None:
    """Classes of samples in a file: spikefit predict runs/first digits.npy."""
    from spikefit.cli.targets import checkpoint_recipe, read_samples
    from spikefit.training import predict

    answer = predict(checkpoint, read_samples(file, checkpoint_recipe(checkpoint)))
    best = answer.probabilities.max(-1).values.tolist()
    rows = [
        {"sample": i, "class": answer.names[c], "probability": p}
        for i, (c, p) in enumerate(zip(answer.classes.tolist(), best, strict=True))
    ]
    if as_json:
        return print_json(rows)
    from spikefit.cli.show import show_predictions

    show_predictions(rows)


@app.command()
def profile(
    target: Annotated[str, typer.Argument(help="model, recipe file, or package.module:factory")],
    pairs: Pairs = None,
    predict_only: Annotated[
        bool, typer.Option("--predict-only", help="from shapes alone; nothing is allocated")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Where memory, time and energy go: spikefit profile vgg9 timesteps=4 batch=8 image=3x32x32 strategy=bptt."""
    from spikefit.cli.targets import profile_target

    result = profile_target(target, read_pairs(pairs), predict_only=predict_only).to_dict()
    if as_json:
        return print_json(result)
    from spikefit.cli.show import show_profile

    show_profile(target, result)


@app.command()
def plan(
    target: Annotated[str, typer.Argument(help="model, recipe file, or package.module:factory")],
    pairs: Pairs = None,
    save: Annotated[Path | None, typer.Option(help="write the plan; strategy=lean:FILE uses it")] = None,
    as_json: AsJson = False,
) -> None:
    """What every unit keeps so that a step fits: spikefit plan vgg9 budget=100MB timesteps=8 batch=16 image=3x32x32."""
    from spikefit.cli.targets import plan_target

    made = plan_target(target, read_pairs(pairs))
    if save is not None:
        made.save(save)
    if as_json:
        return print_json(made.to_dict())
    print(made.explain())
    if save is not None:
        print(f"Written: {save} (use it with strategy=lean:{save})")


@app.command()
def verify(
    target: Annotated[str, typer.Argument(help="model, recipe file, or package.module:factory")],
    pairs: Pairs = None,
    as_json: AsJson = False,
) -> None:
    """Proof that a strategy is as exact as it says: spikefit verify vgg9 strategy=lean:spikes timesteps=4 batch=2."""
    from spikefit.cli.targets import verify_target

    verdict = verify_target(target, read_pairs(pairs))
    if as_json:
        print_json(verdict.to_dict())
    else:
        print(verdict)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command()
def report(
    target: Annotated[str, typer.Argument(help="model, recipe file, or package.module:factory")],
    pairs: Pairs = None,
    as_json: AsJson = False,
) -> None:
    """Bytes before and after, per unit: spikefit report vgg9 strategy=lean:spikes (or budget=100MB)."""
    from spikefit.cli.targets import report_target

    found = report_target(target, read_pairs(pairs))
    if as_json:
        return print_json(found.to_dict())
    print(found)


@app.command()
def doctor(
    target: Annotated[str, typer.Argument(help="model, recipe file, or package.module:factory")],
    pairs: Pairs = None,
    as_json: AsJson = False,
) -> None:
    """Forgotten resets, kept graphs, growing lists: spikefit doctor mynet:make timesteps=4 batch=8 image=2x16x16.

    A model of your own takes [T, B, ...] and gives logits [T, B, K]; if it has a reset(), that is called before every
    step.
    """
    from spikefit.cli.targets import doctor_target

    found = doctor_target(target, read_pairs(pairs))
    if as_json:
        return print_json(found.to_dict())
    print(found)


@app.command()
def compare(
    target: Annotated[str, typer.Argument(help="recipe file, or a model with data=...")],
    pairs: Pairs = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the trainings in --out")] = False,
    as_json: AsJson = False,
) -> None:
    """One recipe, several strategies, side by side: spikefit compare RECIPE strategies=bptt,checkpoint --out DIR."""
    from spikefit.cli.targets import read_recipe
    from spikefit.reporting import compare, table_text

    settings = read_pairs(pairs)
    strategies = [s.strip() for s in settings.pop("strategies", "bptt,checkpoint").split(",") if s.strip()]
    kept = f"the trainings in {out} are saved; the same command with --resume goes on with them."
    with tells_what_is_left(lambda: "nothing is saved, because there was no --out." if out is None else kept):
        rows = compare(read_recipe(target, settings), strategies, out=out, resume=resume, progress=True)
    if as_json:
        return print_json(rows)
    print(table_text(rows))
    if out is not None:
        print(f"Written: {out / 'report.html'} (open it in a browser) and {out / 'compare.json'}")


@app.command()
def study(
    target: Annotated[Path, typer.Argument(help="study file")],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Variants x seeds x data sets in one table: spikefit study studies/demo_tau.toml."""
    from spikefit.cli.show import show_study
    from spikefit.reporting import study

    with tells_what_is_left(lambda: "finished runs are saved; the same command goes on with the next one."):
        rows = study(target, out=out, progress=True)
    if as_json:
        return print_json(rows)
    show_study(target, rows, out)


@app.command(name="list")
def list_(
    what: Annotated[str | None, typer.Argument(help="models, strategies, neurons, norms, ...")] = None,
    model: Annotated[str | None, typer.Argument(help="with strategies: which apply to this model")] = None,
    pairs: Pairs = None,
    as_json: AsJson = False,
) -> None:
    """What there is: spikefit list models, spikefit list strategies vgg9 share=channel groups=2."""
    from spikefit.cli.lists import listing
    from spikefit.cli.show import show_rows

    rows = listing(what, model, read_pairs(pairs))
    if as_json:
        return print_json(rows)
    show_rows(rows)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions, device, threads, and which backends run here."""
    from spikefit.cli.lists import environment_rows
    from spikefit.cli.show import show_rows

    rows = environment_rows()
    if as_json:
        return print_json({row["name"]: row["value"] for row in rows})
    show_rows(rows)
