"""The package as users get it: a wheel that builds, installs and carries its types and licence."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # the build runs in this environment, so that no second copy of the build tools is fetched
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    (built,) = out.glob("*.whl")
    return built


def test_wheel_carries_code_types_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"spikefit/__init__.py", "spikefit/py.typed", "spikefit/ops/lif/cuda.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split(": ")[1] for line in required) == ["numpy>=1.26", "torch>=2.11"]


def test_wheel_installs_and_runs(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    assert subprocess.run(pip, capture_output=True).returncode == 0
    code = (
        "import sys, spikefit, torch; assert spikefit.__file__.startswith(sys.argv[1]), spikefit.__file__\n"
        "model = spikefit.create_model('mlp', input_shape=(4,), hidden=[8], num_classes=3)\n"
        "print(tuple(model(torch.rand(5, 2, 4)).shape))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, env={"PYTHONPATH": str(target)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(5, 2, 3)"
