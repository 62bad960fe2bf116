"""The shapes in the signatures are true: checked at run time, and shown to be checked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.losses.test_fused import problem
from trl_reasoning_distill.losses import _head, _rows, _tokens, divergence, fused

beartype = pytest.importorskip("beartype", reason="run-time checks of shapes need beartype, of the `dev` extra")
jaxtyping = pytest.importorskip("jaxtyping", reason="run-time checks of shapes need jaxtyping, of the `dev` extra")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Give a function's module the names that it imports for type checkers only, and check its calls."""

    def check(function: Callable[..., Any]) -> Callable[..., Any]:
        module = sys.modules[function.__module__]
        for name in ("Bool", "Float", "Int"):
            monkeypatch.setattr(module, name, getattr(jaxtyping, name), raising=False)
        wrapped = jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)
        monkeypatch.setattr(module, function.__name__, wrapped)
        return wrapped

    return check


def test_signatures_hold_for_a_problem_with_every_term(checked):
    for function in (
        divergence.topk_divergence,
        divergence.truncate_to_top_p,
        fused.fused_linear_distillation_loss,
        fused.default_chunk_size,
        _rows.row_statistics,
        _rows.row_gradient_,
        _head._losses_and_gradient_,
        _tokens.token_losses,
        _head._full_vocabulary_kl,
        _tokens._log_softmax,
        _tokens._first_occurrence,
    ):
        checked(function)
    case = problem(temperature=2.0, divergence="jsd", top_p=0.9, chunk_size=2)
    arguments = {name: value.to(torch.float32) for name, value in case.weights.items()}
    out = fused.fused_linear_distillation_loss(
        case.hidden.float().requires_grad_(),
        case.weight.float().requires_grad_(),
        case.labels,
        bias=case.bias.float(),
        teacher=case.teacher,
        reference=case.reference,
        **arguments,
        **case.settings,
    )
    assert torch.isfinite(out.loss)


def test_a_wrong_shape_is_noticed(checked):
    function = checked(divergence.topk_divergence)
    with pytest.raises(jaxtyping.TypeCheckError):
        function(torch.zeros(2, 3), torch.zeros(2, 3), student_log_tail=torch.zeros(3))
