"""The shapes in the signatures are true: checked at run time, and shown to be checked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.losses.cases import live_teacher, problem
from trl_reasoning_distill.losses import _fused_head, _rows, _tiles, _tokens, divergence, fused

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
        _fused_head._losses_and_gradient_,
        _tokens.token_losses,
        _tokens._shared_log_softmax,
        _tokens._topk_kd,
        _tiles.top_k_targets,
        _tiles.dense_divergence_,
        _fused_head._second_models,
        _tokens._log_softmax,
        _tokens._first_occurrence,
    ):
        checked(function)
    case = problem(temperature=2.0, divergence="jsd", chunk_size=2)
    for teacher in (case.teacher, live_teacher(top_k=2, on="student"), live_teacher(top_k=None)):
        out, _ = dataclasses.replace(case, teacher=teacher).run(torch.float32)
        assert torch.isfinite(out.loss)


def test_a_wrong_shape_is_noticed(checked):
    function = checked(divergence.topk_divergence)
    with pytest.raises(jaxtyping.TypeCheckError):
        function(torch.zeros(2, 3), torch.zeros(2, 3), student_log_tail=torch.zeros(3))
