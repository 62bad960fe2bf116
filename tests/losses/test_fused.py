"""The fused loss against the dense float64 reference: values and gradients, for every kind of problem."""

from __future__ import annotations

import dataclasses
import unittest.mock
import weakref

import pytest
import torch
from hypothesis import given, settings

from tests.losses.cases import WEIGHTS, Case, cases, problem, relative_error, topk_targets
from trl_reasoning_distill.losses import _fused_head, _rows
from trl_reasoning_distill.losses.divergence import TopKTargets, topk_divergence
from trl_reasoning_distill.losses.fused import (
    LinearReference,
    default_chunk_size,
    fused_linear_distillation_loss,
)

PARTS = ("nll", "kd", "kl", "entropy", "teacher_mass", "student_mass")


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_values_and_gradients_are_those_of_the_formula(device, case):
    precisions = [(torch.float64, 1e-8)]
    if case.has_resolvable_tails:
        precisions.append((torch.float32, 5e-4))
    for dtype, tolerance in precisions:
        out, grads = case.run(dtype, device)
        parts, expected_grads = case.expected(dtype)
        torch.testing.assert_close(out.loss.detach().cpu().double(), parts["loss"], atol=tolerance, rtol=tolerance)
        for name in PARTS:
            torch.testing.assert_close(getattr(out, name).cpu().double(), parts[name], atol=tolerance, rtol=tolerance)
        for grad, expected in zip(grads, expected_grads, strict=True):
            assert grad.dtype == dtype
            scale = max(1.0, float(expected.norm()))
            assert float((grad.cpu().double() - expected).norm()) < tolerance * scale
        assert (out.kd >= 0).all()
        assert (out.kl >= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_precision_at_the_shape_of_a_head(device, temperature, divergence):
    """Errors that the docs promise: relative, of the whole gradient, for a vocabulary of thousands."""
    generator = torch.Generator().manual_seed(1)
    tokens, width, vocab = 24, 64, 4001
    case = Case(
        hidden=torch.randn(tokens, width, dtype=torch.float64, generator=generator),
        weight=torch.randn(vocab, width, dtype=torch.float64, generator=generator) * 0.3,
        bias=None,
        labels=torch.randint(0, vocab, (tokens,), generator=generator),
        teacher=topk_targets(3 * torch.randn(tokens, vocab, dtype=torch.float64, generator=generator), 25, temperature),
        reference=None,
        weights={name: torch.full((tokens,), 0.5, dtype=torch.float64) for name in WEIGHTS},
        settings={"temperature": temperature, "divergence": divergence, "chunk_size": 10},
    )
    for dtype, value_error, gradient_error in ((torch.float32, 1e-6, 1e-6), (torch.bfloat16, 5e-3, 5e-3)):
        out, grads = case.run(dtype, device)
        parts, expected = case.expected(dtype)
        assert relative_error(out.loss, parts["loss"]) < value_error
        assert max(map(relative_error, grads, expected)) < gradient_error


def test_bfloat16_loses_no_more_than_materialised_logits_would(device):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(24, 64, generator=generator).bfloat16().to(device).requires_grad_()
    weight = (0.3 * torch.randn(4001, 64, generator=generator)).bfloat16().to(device).requires_grad_()
    labels = torch.randint(0, 4001, (24,), generator=generator).to(device)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]

    def cross_entropy(hidden, weight, upcast):
        return torch.nn.functional.cross_entropy((hidden @ weight.T).to(upcast), labels, reduction="sum")

    expected = [grad.cpu() for grad in torch.autograd.grad(cross_entropy(*exact, torch.float64), exact)]
    materialised = torch.autograd.grad(cross_entropy(hidden, weight, torch.float32), (hidden, weight))
    fused = torch.autograd.grad(fused_linear_distillation_loss(hidden, weight, labels).loss, (hidden, weight))
    for ours, theirs, truth in zip(fused, materialised, expected, strict=True):
        assert relative_error(ours, truth) <= 1.05 * relative_error(theirs, truth)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sure_student_is_not_blurred_by_bfloat16(device, temperature):
    """Its likely tokens have large logits, which bfloat16 knows to a few percent: these few are computed in float32."""
    generator = torch.Generator().manual_seed(3)
    tokens, width, vocab = 16, 64, 500
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    weight = torch.randn(vocab, width, dtype=torch.float64, generator=generator)
    hidden = 0.2 * weight[labels] + 0.1 * torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    case = Case(
        hidden=hidden,
        weight=weight,
        bias=torch.randn(vocab, dtype=torch.float64, generator=generator),
        labels=labels,
        teacher=topk_targets(1.2 * hidden @ weight.T, 10, temperature),
        reference=None,
        weights={name: torch.ones(tokens, dtype=torch.float64) for name in WEIGHTS},
        settings={"temperature": temperature, "logit_scale": 1.2, "logit_softcap": 40.0},
    )
    out, grads = case.run(torch.bfloat16, device)
    parts, expected = case.expected(torch.bfloat16)
    assert parts["nll"].mean() < 0.2
    torch.testing.assert_close(out.nll.cpu().double(), parts["nll"], rtol=1e-2, atol=1e-5)
    assert max(map(relative_error, grads, expected)) < 8e-3

    hidden, weight = (x.bfloat16().to(device) for x in (hidden, weight))
    logits = (hidden @ weight.T + case.bias.bfloat16().to(device)) * 1.2
    materialised = torch.log_softmax(40 * torch.tanh(logits.float() / 40), -1).gather(1, labels.to(device)[:, None])
    assert relative_error(out.nll, parts["nll"]) < 0.2 * relative_error(-materialised[:, 0], parts["nll"])


def test_metrics(device):
    case = problem(vocab=7)
    out, _ = case.run(device=device)
    logits = case.hidden @ case.weight.T + case.bias
    mask = case.labels != -100
    assert torch.equal(out.mask.cpu(), mask)
    assert torch.equal(out.is_top1.cpu(), (logits.argmax(-1) == case.labels) & mask)
    assert torch.equal(out.top1_agreement.cpu(), (logits.argmax(-1) == case.teacher.ids[:, 0]) & mask)
    for name in (*PARTS, "is_top1", "top1_agreement"):
        assert getattr(out, name).shape == mask.shape
        assert not getattr(out, name).requires_grad
        assert not getattr(out, name).cpu()[~mask].any()


def test_of_equal_logits_the_first_is_the_prediction(device):
    """As `argmax` of the whole row, whether the equals are named by label and teacher or not."""
    hidden, weight = torch.ones(3, 1, device=device), torch.zeros(6, 1, device=device)
    teacher = TopKTargets(
        torch.tensor([[0, 3], [3, -1], [0, -1]], device=device), torch.full((3, 2), -1.0, device=device)
    )
    out = fused_linear_distillation_loss(hidden, weight, torch.tensor([0, 2, 5], device=device), teacher=teacher)
    assert out.is_top1.tolist() == [True, False, False]
    assert out.top1_agreement.tolist() == [True, False, True]


def test_chunks_do_not_change_the_result(device):
    whole, whole_grads = problem(temperature=2.0).run(device=device)
    for chunk_size in (1, 2, 4, 100):
        out, grads = problem(temperature=2.0, chunk_size=chunk_size).run(device=device)
        torch.testing.assert_close(out.loss, whole.loss)
        torch.testing.assert_close(grads, whole_grads)


def test_one_tile_lives_at_a_time(device):
    made: list[weakref.ref[torch.Tensor]] = []
    logits_of = _fused_head.Head.logits

    def noting(head, hidden, **options):
        assert not any(tile() is not None for tile in made)
        tile = logits_of(head, hidden, **options)
        made.append(weakref.ref(tile))
        return tile

    case = dataclasses.replace(problem(chunk_size=2), reference=None)
    with unittest.mock.patch.object(_fused_head.Head, "logits", noting):
        case.run(device=device)
    assert len(made) == 3


def test_t_squared_scales_value_and_gradient(device):
    case = problem(temperature=3.0)
    case.weights["sft_weight"].zero_()
    case.weights["kl_weight"].zero_()
    scaled, scaled_grads = case.run(device=device)
    plain, plain_grads = dataclasses.replace(case, settings={"temperature": 3.0, "scale_by_t2": False}).run(
        device=device
    )
    torch.testing.assert_close(scaled.loss, 9 * plain.loss)
    torch.testing.assert_close(scaled_grads, [9 * grad for grad in plain_grads])


def test_a_divergence_of_ones_own_takes_the_place_of_the_built_in_ones(device):
    def total_variation(student, teacher, student_log_tail):
        return (student.exp() - teacher.exp()).abs().sum(-1) + 0 * student_log_tail

    def forward_kl(student, teacher, student_log_tail):
        return topk_divergence(student, teacher, student_log_tail=student_log_tail)

    case = problem(temperature=2.0)
    built_in, built_in_grads = case.run(device=device)
    own, own_grads = dataclasses.replace(case, settings={"temperature": 2.0, "divergence": forward_kl}).run(
        device=device
    )
    torch.testing.assert_close(own.loss, built_in.loss)
    torch.testing.assert_close(own_grads, built_in_grads)
    other, _ = dataclasses.replace(case, settings={"divergence": total_variation}).run(device=device)
    assert torch.isfinite(other.loss)
    assert not torch.allclose(other.loss, built_in.loss)


def test_padding_ids_and_rows_without_targets_count_for_nothing(device):
    case = problem()
    ids, log_probs = case.teacher.ids, case.teacher.log_probs
    padded = TopKTargets(
        torch.cat([ids, torch.full_like(ids, -1)], 1), torch.cat([log_probs, torch.zeros_like(log_probs)], 1)
    )
    out, grads = case.run(device=device)
    again, again_grads = dataclasses.replace(case, teacher=padded).run(device=device)
    torch.testing.assert_close(again.loss, out.loss)
    torch.testing.assert_close(again_grads, grads)

    nothing = TopKTargets(torch.full_like(ids, -1), log_probs)
    without, without_grads = dataclasses.replace(case, teacher=None).run(device=device)
    empty, empty_grads = dataclasses.replace(case, teacher=nothing).run(device=device)
    assert not empty.kd.any()
    assert not empty.teacher_mass.any()
    torch.testing.assert_close(empty.loss, without.loss)
    torch.testing.assert_close(empty_grads, without_grads)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0, 30.0, 100.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_all_of_the_vocabulary_on_the_support_leaves_no_tail(device, temperature, divergence):
    # Without T², which at T = 100 would magnify the rounding of a divergence that is nearly 0.
    case = problem(vocab=7, k=7, temperature=temperature, divergence=divergence, scale_by_t2=False)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        out, grads = case.run(dtype, device)
        parts, expected = case.expected(dtype)
        torch.testing.assert_close(out.kd.cpu().double(), parts["kd"], atol=tolerance, rtol=tolerance)
        assert max(map(relative_error, grads, expected)) < tolerance


def test_numbers_and_tensors_are_equal_weights(device):
    case = problem()
    case.weights = {name: torch.full((6,), 0.5, dtype=torch.float64) for name in WEIGHTS}
    out, _ = case.run(device=device)
    case.weights = {name: torch.tensor(0.5) for name in WEIGHTS}
    torch.testing.assert_close(case.run(device=device)[0].loss, out.loss)
    torch.testing.assert_close(out.loss, 0.5 * (out.nll + out.kd + out.kl).sum())


def test_no_supervised_token_gives_a_zero_whose_graph_reaches_everything(device):
    hidden = torch.randn(3, 4, device=device, requires_grad=True)
    weight = torch.randn(5, 4, device=device, requires_grad=True)
    bias = torch.randn(5, device=device, requires_grad=True)
    teacher = TopKTargets(torch.zeros(3, 1, dtype=torch.long, device=device), torch.zeros(3, 1, device=device))
    out = fused_linear_distillation_loss(
        hidden, weight, torch.full((3,), -100, device=device), bias=bias, teacher=teacher, kd_weight=1.0
    )
    out.loss.backward()
    assert out.loss.item() == 0
    for leaf in (hidden, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert out.nll.shape == (3,)
    assert not out.mask.any()


@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(device, frozen):
    case = problem()
    leaves = dict(zip(("hidden", "weight", "bias"), (x.to(device) for x in case.parameters), strict=True))
    expected = dict(zip(leaves, case.run(device=device)[1], strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    reference = LinearReference(case.reference.hidden.to(device), case.reference.weight.to(device))
    teacher = TopKTargets(case.teacher.ids.to(device), case.teacher.log_probs.to(device))
    out = fused_linear_distillation_loss(
        leaves["hidden"],
        leaves["weight"],
        case.labels.to(device),
        bias=leaves["bias"],
        teacher=teacher,
        reference=reference,
        **{name: value.to(device) for name, value in case.weights.items()},
    )
    out.loss.backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[name])


def test_no_grad_computes_values_only(device):
    case = problem()
    hidden, weight, _ = (x.detach().to(device).requires_grad_() for x in case.parameters)
    labels = case.labels.to(device)
    with_grad = fused_linear_distillation_loss(hidden, weight, labels)
    with torch.no_grad(), unittest.mock.patch.object(_rows, "row_gradient_", side_effect=AssertionError):
        without = fused_linear_distillation_loss(hidden, weight, labels)
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.loss, with_grad.loss.detach())
    torch.testing.assert_close(without.nll, with_grad.nll)


def test_autocast_runs_the_matmuls_in_its_dtype_and_returns_gradients_in_the_parameters(device):
    case = problem(tokens=40, width=32, vocab=101)
    hidden, weight = case.hidden.float().to(device).requires_grad_(), case.weight.float().to(device).requires_grad_()
    labels = case.labels.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        fused_linear_distillation_loss(hidden, weight, labels, chunk_size=16).loss.backward()
    half = [hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
    fused_linear_distillation_loss(*half, labels, chunk_size=16).loss.backward()
    for full, low in zip((hidden, weight), half, strict=True):
        assert full.grad.dtype == torch.float32
        torch.testing.assert_close(full.grad, low.grad.float(), rtol=2e-2, atol=2e-3)


def test_the_weight_may_be_released_before_the_backward_pass(device):
    """As under ZeRO-3, where the head is gathered around the call only."""
    case = problem()
    expected = case.run(device=device)[1][1]
    hidden, weight, bias = (x.detach().to(device).requires_grad_() for x in case.parameters)
    loss = fused_linear_distillation_loss(
        hidden,
        weight,
        case.labels.to(device),
        bias=bias,
        teacher=TopKTargets(case.teacher.ids.to(device), case.teacher.log_probs.to(device)),
        reference=LinearReference(case.reference.hidden.to(device), case.reference.weight.to(device)),
        **{name: value.to(device) for name, value in case.weights.items()},
    ).loss
    saved = loss.grad_fn.saved_tensors
    assert sorted(tuple(tensor.shape) for tensor in saved) == [(5, 4), (11,), (11, 4)]
    assert weight.data_ptr() not in {tensor.data_ptr() for tensor in saved}
    weight.untyped_storage().resize_(0)
    (grad,) = torch.autograd.grad(loss, [weight])
    torch.testing.assert_close(grad, expected)


def test_the_upstream_gradient_scales_and_a_second_backward_is_refused(device):
    case = problem()
    hidden, weight, _ = (x.detach().to(device).requires_grad_() for x in case.parameters)
    loss = fused_linear_distillation_loss(hidden, weight, case.labels.to(device)).loss
    once = torch.autograd.grad(loss, hidden)[0]
    loss = fused_linear_distillation_loss(hidden, weight, case.labels.to(device)).loss * 3
    torch.testing.assert_close(torch.autograd.grad(loss, hidden, retain_graph=True)[0], 3 * once)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_second_backward_is_refused_also_where_nothing_is_scaled(device, dtype):
    case = problem()
    hidden = case.hidden.to(device, dtype).requires_grad_()
    loss = fused_linear_distillation_loss(hidden, case.weight.to(device, dtype), case.labels.to(device)).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    assert first.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


def test_a_second_derivative_is_refused(device):
    """Not given as a gradient without a graph, whose own gradient would be zero in silence."""
    case = problem()
    hidden = case.hidden.to(device).requires_grad_()
    loss = fused_linear_distillation_loss(hidden, case.weight.to(device), case.labels.to(device)).loss
    with pytest.raises(RuntimeError, match=r"no second derivative.*Leave out `create_graph=True`"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_the_loss_may_stand_in_a_checkpoint(device):
    case = problem()
    hidden, weight = case.hidden.to(device).requires_grad_(), case.weight.to(device)
    expected = torch.autograd.grad(fused_linear_distillation_loss(hidden, weight, case.labels.to(device)).loss, hidden)
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(
            lambda x: fused_linear_distillation_loss(x * 1, weight, case.labels.to(device)).loss,
            hidden,
            use_reentrant=reentrant,
        )
        hidden.grad = None
        loss.backward()
        torch.testing.assert_close(hidden.grad, expected[0])


def test_masked_tokens_do_not_matter_whatever_they_hold(device):
    case = problem()
    out, grads = case.run(device=device)
    case.hidden[1] = torch.nan
    case.teacher.ids[1] = 10_000
    again, again_grads = case.run(device=device)
    torch.testing.assert_close(again.loss, out.loss)
    assert not again_grads[0][1].any()
    torch.testing.assert_close(again_grads[1], grads[1])


def test_chunks_are_chosen_by_memory():
    hidden = torch.empty(100_000, 896, dtype=torch.bfloat16)
    assert default_chunk_size(hidden[:1792], needs_head_grad=True) == 1792
    assert 448 <= default_chunk_size(hidden, needs_head_grad=True) <= 896
    assert default_chunk_size(hidden, needs_head_grad=False) <= 256
    assert default_chunk_size(hidden[:1792].float(), needs_head_grad=True) == 256
    assert default_chunk_size(hidden[:0], needs_head_grad=True) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"temperature": 1e3}, "at most 100"),
        ({"kl_direction": "both"}, "`kl_direction` must be one of reverse, forward"),
        ({"logit_softcap": 0.0}, "`logit_softcap` must be above 0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1"),
        ({"bias": torch.zeros(4)}, r"`bias` must be of shape \(5,\)"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "`labels` has 2 tokens, but `hidden` has 3"),
        ({"labels": torch.full((3,), 5)}, "`labels` holds the id 5, but the head knows 5 tokens"),
        ({"labels": torch.tensor([0, -1, 2])}, "`labels` holds -1, which is no token. Only -100 marks"),
        ({"labels": torch.tensor([0, -99, -100])}, "`labels` holds -99"),
        ({"sft_weight": torch.ones(2)}, r"`sft_weight` must be a number or of shape \(3,\)"),
        ({"weight": torch.zeros(5, 3)}, "`hidden` and `weight` must be"),
        (
            {"teacher": TopKTargets(torch.full((3, 1), 7), torch.zeros(3, 1))},
            "`teacher.ids` holds the id 7.*Align them",
        ),
        ({"reference": TopKTargets(torch.zeros(2, 1).int(), torch.zeros(2, 1))}, "`reference.ids` has 2 tokens"),
        ({"reference": LinearReference(torch.zeros(3, 2), torch.zeros(4, 2))}, "reference's head knows 4 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides_named(arguments, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(3, dtype=torch.long),
    } | arguments
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation_loss(**arguments)
