"""What is special about a live teacher; its values and gradients are compared with the formula in `test_fused`."""

from __future__ import annotations

import dataclasses
import unittest.mock

import pytest
import torch

from tests.losses.cases import Case, live_teacher, problem, relative_error, to
from trl_reasoning_distill.losses import _fused_head, fused
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import LinearTeacher, fused_linear_distillation_loss

DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def distillation_only(case: Case) -> Case:
    weights = {
        name: weight if name == "kd_weight" else torch.zeros_like(weight) for name, weight in case.weights.items()
    }
    return dataclasses.replace(case, weights=weights, reference=None)


@pytest.mark.parametrize("on", ["teacher", "student"])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_a_support_of_all_shared_ids_is_the_whole_vocabulary(device, divergence, beta, on):
    case = distillation_only(problem(temperature=2.0, divergence=divergence, beta=beta))
    dense, dense_grads = dataclasses.replace(case, teacher=live_teacher(top_k=None)).run(device=device)
    for top_k in (9, 100):
        sparse, grads = dataclasses.replace(case, teacher=live_teacher(top_k=top_k, on=on)).run(device=device)
        torch.testing.assert_close(sparse.kd, dense.kd)
        torch.testing.assert_close(grads, dense_grads)
        torch.testing.assert_close(sparse.top1_agreement, dense.top1_agreement)


@pytest.mark.parametrize("top_k", [3, None])
def test_rows_that_are_not_shared_get_no_mass_and_no_gradient(device, top_k):
    case = distillation_only(problem(temperature=2.0))
    case.teacher = live_teacher(top_k=top_k)
    out, (_, grad_weight, grad_bias) = case.run(device=device)
    assert not grad_weight[9:].any()
    assert not grad_bias[9:].any()
    case.weight[9:] += 100
    case.teacher.weight[9:] -= 100
    torch.testing.assert_close(case.run(device=device)[0].kd, out.kd)


def test_the_likelihood_is_over_the_whole_vocabulary_of_the_student(device):
    case = problem()
    case.labels[0] = 10  # not a shared id
    case.hidden[0] = 5 * case.weight[10]  # and the student's choice
    out, _ = dataclasses.replace(case, teacher=live_teacher(top_k=3)).run(device=device)
    without, _ = dataclasses.replace(case, teacher=None).run(device=device)
    assert out.is_top1[0]
    for name in ("nll", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(out, name), getattr(without, name))


@pytest.mark.parametrize(("top_k", "on"), [(1, "teacher"), (3, "teacher"), (3, "student"), (None, "teacher")])
def test_agreement_is_that_of_the_most_likely_shared_tokens(device, top_k, on):
    case = problem(tokens=40)
    case.teacher, case.reference = live_teacher(tokens=40, top_k=top_k, on=on), None
    case.teacher.hidden[::2] = 0
    case.teacher.hidden[::2, 0] = case.hidden[::2, 0]
    case.weight[:9, 0] = 9 * case.teacher.weight[:9, 0]
    out, _ = case.run(device=device)
    student = (case.hidden @ case.weight[:9].T + case.bias[:9]).argmax(-1)
    teacher = (case.teacher.hidden @ case.teacher.weight[:9].T).argmax(-1)
    expected = (student == teacher) & (case.labels != -100)
    assert 5 < expected.sum() < 35
    assert torch.equal(out.top1_agreement.cpu(), expected)


@pytest.mark.parametrize("top_k", [3, None])
def test_the_same_model_is_no_distance_away(device, top_k):
    case = distillation_only(problem(temperature=2.0, divergence="jsd"))
    case.teacher = LinearTeacher(case.hidden, case.weight, case.bias, top_k=top_k)
    out, grads = case.run(torch.float32, device)
    assert out.kd.max() < 1e-6
    assert all(grad.norm() < 1e-5 for grad in grads)
    assert torch.equal(out.top1_agreement, out.mask)


def test_a_tail_that_a_difference_could_not_resolve_is_exact(device):
    """The teacher leaves 1e-9 outside its Top-K: `1 - mass` is 0 in float32, and reverse KL takes its logarithm."""
    teacher_weight = torch.tensor([[0.0], [-20.0], [-22.0], [-23.0]], dtype=torch.float64)
    case = Case(
        hidden=torch.ones(1, 1, dtype=torch.float64),
        weight=torch.tensor([[0.0], [-1.0], [-2.0], [-1.0]], dtype=torch.float64),
        bias=None,
        labels=torch.tensor([0]),
        teacher=LinearTeacher(torch.ones(1, 1, dtype=torch.float64), teacher_weight, top_k=1),
        reference=None,
        weights={name: torch.ones(1, dtype=torch.float64) for name in ("sft_weight", "kd_weight", "kl_weight")},
        settings={"divergence": "reverse_kl"},
    )
    out, grads = case.run(torch.float32, device)
    parts, expected = case.expected(torch.float32)
    torch.testing.assert_close(out.kd.cpu().double(), parts["kd"], rtol=1e-6, atol=0)
    assert max(map(relative_error, grads, expected)) < 1e-6


@pytest.mark.parametrize("top_k", [5, None])
def test_bfloat16_costs_the_rounding_of_both_models_logits(device, top_k):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights = {name: torch.full((16,), 0.5, dtype=torch.float64) for name in ("sft_weight", "kd_weight", "kl_weight")}
    for divergence, beta in DIVERGENCES:
        case = Case(
            hidden=randn(16, 64),
            weight=0.3 * randn(299, 64),
            bias=None,
            labels=torch.randint(0, 299, (16,), generator=generator),
            teacher=LinearTeacher(randn(16, 32), 0.4 * randn(310, 32), top_k=top_k, vocab_size=290),
            reference=None,
            weights=weights,
            settings={"temperature": 2.0, "divergence": divergence, "beta": beta, "chunk_size": 7},
        )
        out, grads = case.run(torch.bfloat16, device)
        parts, expected = case.expected(torch.bfloat16)
        assert relative_error(out.loss, parts["loss"]) < 5e-3
        assert max(map(relative_error, grads, expected)) < 2e-2  # a rounded logit may also leave the Top-K


def test_no_second_tile_is_as_large_as_the_chunk(device):
    case = problem(tokens=24, chunk_size=24)
    case.labels[:] = 1
    case.teacher, case.reference = live_teacher(tokens=24, top_k=None), None
    whole, whole_grads = case.run(device=device)
    sizes = []
    logits_of = _fused_head.Head.logits

    def noting(head, hidden, **options):
        sizes.append((len(head.weight), len(hidden)))
        return logits_of(head, hidden, **options)

    with (
        unittest.mock.patch.object(_fused_head.Head, "logits", noting),
        unittest.mock.patch.multiple(_fused_head, _CPU_SECOND_TILE=10, _ACCELERATOR_SECOND_TILE=10),
    ):
        out, grads = case.run(device=device)
    assert sizes == [(11, 24), (9, 10), (9, 10), (9, 4)]
    torch.testing.assert_close(out.loss, whole.loss)
    torch.testing.assert_close(grads, whole_grads)


def test_tokens_without_a_label_cost_the_teacher_nothing(device):
    case = problem()
    case.labels[:4] = -100
    case.teacher = live_teacher(top_k=3)
    out, grads = case.run(device=device)
    case.teacher.hidden[:4] = torch.nan
    again, again_grads = case.run(device=device)
    torch.testing.assert_close(again.loss, out.loss)
    torch.testing.assert_close(again_grads, grads)
    case.labels[:] = -100
    empty, grads = case.run(device=device)
    assert empty.loss == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("top_k", [3, None])
def test_without_gradients_only_values_are_computed(device, top_k):
    case = dataclasses.replace(problem(), teacher=live_teacher(top_k=top_k))
    expected = case.run(device=device)[0]
    with torch.no_grad():
        out = fused_linear_distillation_loss(
            case.hidden.to(device),
            case.weight.to(device),
            case.labels.to(device),
            bias=case.bias.to(device),
            teacher=to(case.teacher, device, torch.float64),
            reference=to(case.reference, device, torch.float64),
            **{name: weight.to(device) for name, weight in case.weights.items()},
        )
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss.detach())
    torch.testing.assert_close(out.kd, expected.kd)


def test_the_teacher_learns_nothing_and_its_dtype_is_its_own(device):
    case = problem()
    teacher = to(live_teacher(top_k=3), device, torch.bfloat16)
    teacher.hidden.requires_grad_()
    teacher.weight.requires_grad_()
    hidden = case.hidden.float().to(device).requires_grad_()
    weight = case.weight.float().to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        under_autocast = fused_linear_distillation_loss(
            hidden, weight, case.labels.to(device), teacher=to(teacher, device, torch.float32), kd_weight=1.0
        )
    out = fused_linear_distillation_loss(hidden, weight, case.labels.to(device), teacher=teacher, kd_weight=1.0)
    out.loss.backward()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None
    assert hidden.grad.dtype == torch.float32
    torch.testing.assert_close(under_autocast.kd, out.kd, rtol=5e-2, atol=1e-2)


def test_top_p_drops_ids_and_keeps_their_mass_in_the_tail(device):
    case = dataclasses.replace(problem(top_p=0.6), teacher=live_teacher(top_k=5), reference=None)
    out, grads = case.run(torch.float32, device)
    parts, expected = case.expected(torch.float32)
    torch.testing.assert_close(out.kd.cpu().double(), parts["kd"], rtol=1e-5, atol=1e-6)
    assert (out.teacher_mass[out.mask] < 1).all()
    assert max(map(relative_error, grads, expected)) < 1e-5


@pytest.mark.parametrize(
    ("teacher", "arguments", "message"),
    [
        (
            {"vocab_size": 12},
            {},
            "`teacher.vocab_size` is 12, but the teacher's head knows 13 tokens and the student's 11",
        ),
        ({"vocab_size": 0}, {}, "`teacher.vocab_size` is 0"),
        ({"top_k": 0}, {}, "`teacher.top_k` must be at least 1"),
        ({"top_k": 2, "on": "both"}, {}, "`teacher.on` must be"),
        ({"tokens": 5}, {}, "`teacher.hidden` has 5 tokens, but `hidden` has 6"),
        ({}, {"divergence": lambda s, t, tail: tail}, "needs a support: set `teacher.top_k`"),
        ({}, {"top_p": 0.9}, "needs `teacher.top_k`"),
        ({"top_k": 2, "on": "student"}, {"top_p": 0.9}, "`teacher.on='teacher'`"),
        ({"bias": torch.zeros(3)}, {}, r"`teacher.bias` must be of shape \(13,\)"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, arguments, message):
    case = problem()
    given = live_teacher(tokens=teacher.pop("tokens", 6))
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation_loss(
            case.hidden, case.weight, case.labels, teacher=dataclasses.replace(given, **teacher), **arguments
        )


def test_a_tail_given_with_the_targets_takes_the_place_of_the_difference():
    targets = TopKTargets(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.2]]).log(), torch.tensor([0.1]).log())
    cut = targets.truncated(0.4)
    assert cut.ids.tolist() == [[0, -1]]
    torch.testing.assert_close(cut.log_tail.exp(), torch.tensor([0.3]))
    assert targets[torch.tensor([0])].log_tail.shape == (1,)
    assert fused.LinearTeacher(torch.zeros(1, 1), torch.zeros(5, 1)).shared_ids(4) == 4
