"""The window kernels compile for a GPU, without one: Triton brings the assembler. Runs in a process of its own, since
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
from spikefit.ops.window_scan import across_release, apart, behind, cuda, in_turn

VARIANTS = [
    dict(links=behind(4), dtype="fp32", size="i32", REPEATED=False, FUSE="omega", RESET="none", STRICT=True,
         MEMBRANES=True, SLOPE=2, GIVEN=True),
    dict(links=across_release(), dtype="bf16", size="i64", REPEATED=True, FUSE="omega", RESET="soft", STRICT=False,
         MEMBRANES=False, SLOPE=0, GIVEN=False),
    dict(links=in_turn(2), dtype="fp16", size="i32", REPEATED=False, FUSE="a", RESET="hard", STRICT=True,
         MEMBRANES=True, SLOPE=1, GIVEN=False),
    dict(links=across_release(), dtype="fp32", size="i32", REPEATED=False, FUSE="relu", RESET="none", STRICT=True,
         MEMBRANES=True, SLOPE=5, GIVEN=True),
    dict(links=apart(1), dtype="fp32", size="i32", REPEATED=False, FUSE="none", RESET="none", STRICT=True,
         MEMBRANES=False, SLOPE=3, GIVEN=False),
]
found = []
for variant in VARIANTS:
    links, dtype, size = (variant.pop(key) for key in ("links", "dtype", "size"))
    for kernel in (cuda._forward_kernel, cuda._backward_kernel):
        given = {"BLOCK": cuda.BLOCK, "P": len(links), "LINKS": tuple(links.codes)} | variant
        constants = {k: v for k, v in given.items() if k in kernel.arg_names}
        types = {"N": size} | {name: "constexpr" for name in constants}
        types |= {f"{name}_ptr": f"*{dtype}" for name in ("x", "s", "g", "dx")}
        default = lambda name: "*fp32" if name.endswith("_ptr") else "fp32"
        signature = {name: types.get(name, default(name)) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
        code = built.asm["ptx"]
        found.append({"cubin": len(built.asm["cubin"]), "fused": "fma." in code, "flushed": ".ftz" in code})
print(json.dumps(found))
"""


def test_kernels_compile_without_fused_multiply_add(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    for built in found:
        assert built["cubin"] > 0
        assert not built["fused"], "a fused multiply-add rounds once, the reference twice: spikes would differ"
        assert not built["flushed"], "small membranes are kept as the reference keeps them"
