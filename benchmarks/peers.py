"""The environment of the peers: `.peers/` at the repository root, with SpikingJelly, snnTorch and this package.

They share one interpreter with us so that all can be timed interleaved in one process, and stay out of `.venv`, whose
set-up must not depend on them. `python benchmarks/peers.py` makes it; what is already there is skipped.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".peers"
PYTHON = FOLDER / "bin" / "python"
STAMP = FOLDER / ".installed"

PEERS = ("spikingjelly==2.0.0", "snntorch==1.0.0")
# What the peers import; their own requirements also ask for torchvision and torchaudio, which nothing here uses.
NEEDED = ("torch==2.13.0", "numba", "h5py", "loguru", "matplotlib", "scipy", "tqdm", "requests")


def ensure() -> Path:
    """Make the environment unless its stamp is newer than this file; returns its interpreter.

    Raises:
        subprocess.CalledProcessError: pip failed; its own message stands above.
    """
    if STAMP.exists() and STAMP.stat().st_mtime >= Path(__file__).stat().st_mtime:
        return PYTHON
    print(f"setting up {FOLDER.name}/ with {', '.join(PEERS)} (a few minutes, once)", file=sys.stderr)
    if not PYTHON.exists():
        venv.create(FOLDER, with_pip=True)
    _pip("--constraint", str(ROOT / "constraints.txt"), *NEEDED)
    _pip("--no-deps", *PEERS)
    _pip("--no-deps", "setuptools>=77")
    _pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    STAMP.touch()
    return PYTHON


def _pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    print(ensure())
