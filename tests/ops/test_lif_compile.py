"""The Triton kernels compile for a GPU, without one: Triton brings the assembler. Runs in a process of its own, since
the interpreter is chosen when a kernel is defined."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from spikefit.ops.lif import cuda, grid_cuda

PLAIN, WHOLE = (cuda._forward_kernel, cuda._backward_kernel), (grid_cuda._forward_kernel, grid_cuda._backward_kernel)
VARIANTS = [
    dict(dtype="fp32", size="i32", REPEATED=False, LEARNED=False, RESET="soft", RESTING=False, STRICT=False,
         ATTACHED=False, SLOPE=0, GIVEN=False, WANT=False),
    dict(dtype="bf16", size="i64", REPEATED=True, LEARNED=True, RESET="hard", RESTING=True, STRICT=True,
         ATTACHED=True, SLOPE=4, GIVEN=True, WANT=True),
    dict(dtype="fp16", size="i32", REPEATED=False, LEARNED=True, RESET="none", RESTING=False, STRICT=False,
         ATTACHED=True, SLOPE=1, GIVEN=False, WANT=True),
    dict(dtype="fp32", size="i32", REPEATED=False, LEARNED=False, RESET="soft", RESTING=False, STRICT=False,
         ATTACHED=False, SLOPE=0, GIVEN=False, WANT=False, SCALE=65536.0, POWER=16.0, TIES=True),
    dict(dtype="fp32", size="i32", STRICT=False, ATTACHED=False, SLOPE=0, SCALE=65536.0, POWER=16.0, TIES=True),
    dict(dtype="bf16", size="i64", STRICT=True, ATTACHED=True, SLOPE=4, SCALE=256.0, POWER=4.0, TIES=False),
]
found = []
for variant in VARIANTS:
    dtype, size = variant.pop("dtype"), variant.pop("size")
    for kernel in PLAIN if "RESET" in variant else WHOLE:
        given = {"BLOCK": 1024, "SCALE": 0.0, "POWER": 1.0, "TIES": False} | variant
        constants = {k: v for k, v in given.items() if k in kernel.arg_names}
        types = {"T": "i32", "N": size, "end": size} | {name: "constexpr" for name in constants}
        types |= {f"{name}_ptr": f"*{dtype}" for name in ("x", "s", "g", "dx")} | {"lost_ptr": "*u8"}
        default = lambda name: "*fp32" if name.endswith("_ptr") else "fp32"
        signature = {name: types.get(name, default(name)) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
        # the floor of Triton flushes; on a grid it reads whole numbers, and currents that round to 0 either way
        code = built.asm["ptx"].replace("cvt.rmi.ftz", "cvt.rmi")
        found.append({"cubin": len(built.asm["cubin"]), "fused": "fma." in code, "flushed": ".ftz" in code})
print(json.dumps(found))
"""


def test_kernels_compile_without_fused_multiply_add(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 12
    for built in found:
        assert built["cubin"] > 0
        assert not built["fused"], "a fused multiply-add rounds once, the reference twice: spikes would differ"
        assert not built["flushed"], "small membranes are kept as the reference keeps them"
