"""The command line: `spikefit VERB TARGET [key=value ...] [--json]`."""

import sys

# package -> extra of spikefit that brings it
EXTRAS = {
    "typer": "train",
    "pydantic": "train",
    "lightning_fabric": "train",
    "safetensors": "train",
    "rich": "train",
    "plotly": "report",
    "sklearn": "demo",
    "PIL": "images",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 fine, 1 an error of the program, 2 of the input, 130 stopped by hand."""
    try:
        from spikefit.cli.app import main as run  # here, because the core install has no typer
    except ModuleNotFoundError as error:
        if (sentence := missing(error)) is None:
            raise
        print(f"spikefit: {sentence}", file=sys.stderr)
        sys.exit(1)
    run(arguments)


def missing(error: ModuleNotFoundError) -> str | None:
    """One sentence about a package that an extra brings; None for any other."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"this needs the package {package}; install it with: pip install 'spikefit[{EXTRAS[package]}]'."


__all__ = ["main"]
