"""The kernels compile for every generation of NVIDIA's GPUs, down to machine code; no GPU is needed for that."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from trl_reasoning_distill.losses import _triton_gather, _triton_rows, _triton_tiles, _triton_tokens  # noqa: E402

GENERATIONS = {"Turing": 75, "Ampere": 80, "Ada": 89, "Hopper": 90, "Blackwell": 100, "consumer Blackwell": 120}
# What a kernel is compiled with: the rest are its arguments' types.
SWITCHES = {
    "_statistics_kernel": [
        {"HAS_TEMPERATURE": True, "IS_TWO": False},
        {"HAS_TEMPERATURE": True, "IS_TWO": True},
        {"HAS_TEMPERATURE": False, "IS_TWO": False},
    ],
    "_divergence_kernel": [{"DIVERGENCE": number, "HAS_GRADIENT": True} for number in (2, 1, 0)],
}
_TOKENS = {"HAS_TEACHER": True, "HAS_LOG_TAIL": False, "EPS": 1e-7, "BLOCK": 32, "IS_RENORMALIZED": False}
SWITCHES["_token_kernel"] = [
    {**_TOKENS, "HAS_TEMPERATURE": True, "DIVERGENCE": 2},
    {**_TOKENS, "HAS_TEMPERATURE": False, "DIVERGENCE": 1, "HAS_LOG_TAIL": True},
    {**_TOKENS, "HAS_TEMPERATURE": False, "DIVERGENCE": 0, "IS_RENORMALIZED": True},
    {**_TOKENS, "HAS_TEMPERATURE": False, "DIVERGENCE": 0, "HAS_TEACHER": False},
]
SWITCHES["_dot_kernel"] = [{"BLOCK": 1024}]
SWITCHES["_gradient_kernel"] = SWITCHES["_statistics_kernel"]
INTEGERS = {"first_tie_ptr": "*i64", "ids_ptr": "*i64", "agrees_ptr": "*i8", "unique_ptr": "*i8", "flags_ptr": "*i8"}
COUNTS = ("vocab", "tokens", "entries", "width")
LOGITS = ("logits_ptr", "student_ptr", "other_ptr", "hidden_ptr", "weight_matrix_ptr")
CONSTANTS = {"BLOCK": _triton_rows._BLOCK, "LOG_ZERO": -1e4, "HAS_SOFTCAP": True}


def machine_code(kernel: Any, dtype: str, scalar: str, generation: int, switches: dict[str, Any]) -> bytes:
    """Compile a kernel for logits and scalars of these types."""
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name.isupper():
            signature[name] = "constexpr"
            constants[name] = {**CONSTANTS, **switches}[name]
        elif name in INTEGERS:
            signature[name] = INTEGERS[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}" if name in LOGITS else "*fp32"
        else:
            signature[name] = "i32" if name in COUNTS or name.endswith("stride") else scalar
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", generation, 32)
    compiled = triton.compile(
        source,
        target=target,
        options={"num_warps": 1 if kernel is _triton_tokens._token_kernel else _triton_rows._WARPS},
    )
    return compiled.asm["cubin"]


def kernels() -> list[Any]:
    modules = vars(_triton_gather) | vars(_triton_rows) | vars(_triton_tiles) | vars(_triton_tokens)
    return [value for name, value in modules.items() if name.endswith("_kernel")]


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.__name__)
def test_scalars_of_torch_compile_are_taken(kernel: Any) -> None:
    """`torch.compile` hands a Python float to a kernel in float64, which the loop over a row cannot carry."""
    assert machine_code(kernel, "bf16", "fp64", 90, SWITCHES[kernel.__name__][0])


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.__name__)
def test_each_generation_is_compiled_for(kernel: Any, generation: int) -> None:
    assert machine_code(kernel, "bf16", "fp32", generation, SWITCHES[kernel.__name__][0])


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.__name__)
def test_every_variant_is_compiled(kernel: Any, dtype: str, generation: int) -> None:
    for switches in SWITCHES[kernel.__name__]:
        for scalar in ("fp32", "fp64"):
            assert machine_code(kernel, dtype, scalar, generation, switches)
