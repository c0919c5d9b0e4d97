"""`python -m spikefit` is the command `spikefit`."""

from spikefit.cli import main

if __name__ == "__main__":
    main()
