"""The sparse divergences against sums written from the formula, and the properties that make them divergences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.reference import dense_divergence, sparse_divergence, support_of
from trl_reasoning_distill.losses.divergence import DIVERGENCES, TopKTargets, topk_divergence
from trl_reasoning_distill.losses.fused import LinearTeacher, fused_linear_distillation_loss

KINDS = [
    ("forward_kl", 0.5, "tail"),
    ("reverse_kl", 0.5, "tail"),
    ("jsd", 0.0, "tail"),
    ("jsd", 0.3, "tail"),
    ("jsd", 1.0, "tail"),
    ("forward_kl", 0.5, "renormalized"),
]


def distributions(seed: int, tokens: int, vocab: int, sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(2, tokens, vocab, dtype=torch.float64, generator=generator)
    teacher, student = logits.log_softmax(-1)
    return teacher, student


@pytest.mark.parametrize(("divergence", "beta", "support"), KINDS)
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 30),
    k=st.integers(1, 30),
    sharpness=st.sampled_from([0.0, 1.0, 5.0]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
)
def test_it_is_the_divergence_on_the_support(divergence, beta, support, seed, vocab, k, sharpness, top_p):
    teacher, student = distributions(seed, 3, vocab, sharpness)
    log_probs, ids = teacher.topk(min(k, vocab))
    student.requires_grad_()
    value = topk_divergence(
        student.gather(-1, ids), log_probs, divergence=divergence, beta=beta, support=support, top_p=top_p
    )
    expected = torch.stack(
        [
            sparse_divergence(
                student[t].exp(), support_of(ids[t].tolist(), log_probs[t].tolist(), top_p), divergence, beta, support
            )
            for t in range(3)
        ]
    )
    assert (value >= 0).all()
    torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("divergence", "beta", "support"), KINDS)
def test_all_of_the_vocabulary_gives_the_dense_divergence(divergence, beta, support):
    teacher, student = distributions(0, 4, 17, 2.0)
    log_probs, ids = teacher.topk(17)
    value = topk_divergence(student.gather(-1, ids), log_probs, divergence=divergence, beta=beta, support=support)
    dense = [dense_divergence(p, q, divergence, beta) for p, q in zip(teacher.exp(), student.exp(), strict=True)]
    torch.testing.assert_close(value, torch.stack(dense), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("divergence", "beta", "support"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_distributions_have_divergence_zero_and_no_gradient(divergence, beta, support, dtype):
    log_probs = distributions(1, 50, 30, 3.0)[0].topk(7).values.to(dtype)
    student = log_probs.clone().requires_grad_()
    value = topk_divergence(student, log_probs, divergence=divergence, beta=beta, support=support)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert (value >= 0).all()
    assert value.max() < 1e-6
    # On a simplex only differences matter: a constant times the student's own mass is no gradient of its logits.
    mass = student.detach().float().exp()
    of_logits = student.grad.float() - mass * student.grad.float().sum(-1, keepdim=True)
    assert of_logits.abs().max() < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("divergence", "beta", "support"), KINDS)
@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ([0.0, -math.inf], [-math.inf, 0.0]),  # one is sure of what the other excludes
        ([0.0, -math.inf], [0.0, -math.inf]),
        ([-1e-9, -25.0], [-30.0, -1e-9]),
        ([math.log(0.5), math.log(0.5)], [math.log(0.5), math.log(0.5)]),  # no tail at all
        ([math.log(0.5), math.log(0.5)], [-200.0, -200.0]),  # the student is elsewhere
        ([math.log(0.5000001), math.log(0.5)], [1e-7, -20.0]),  # rounding takes the masses beyond 1
        ([-math.inf, -math.inf], [-3.0, -4.0]),  # the teacher says nothing
    ],
)
def test_extremes_are_finite(divergence, beta, support, teacher, student):
    log_probs = torch.tensor([student], requires_grad=True)
    for tail in (None, torch.tensor([-40.0]), torch.tensor([-math.inf])):
        value = topk_divergence(
            log_probs,
            torch.tensor([teacher]),
            divergence=divergence,
            beta=beta,
            support=support,
            student_log_tail=tail,
        )
        (gradient,) = torch.autograd.grad(value.sum(), log_probs)
        assert torch.isfinite(value).all()
        assert value >= 0
        assert torch.isfinite(gradient).all()
        if teacher == [-math.inf, -math.inf]:
            assert value == 0
            assert not gradient.any()


def test_ids_without_mass_belong_to_the_tail():
    teacher, student = distributions(2, 5, 12, 1.0)
    log_probs, ids = teacher.topk(4)
    with_hole = log_probs.clone()
    with_hole[:, 3] = -math.inf
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        torch.testing.assert_close(
            topk_divergence(student.gather(-1, ids), with_hole, divergence=divergence),
            topk_divergence(student.gather(-1, ids[:, :3]), log_probs[:, :3], divergence=divergence),
        )


def test_adaptive_k_keeps_the_fewest_tokens_that_reach_top_p():
    log_probs = torch.tensor([[0.6, 0.3, 0.05], [0.95, 0.03, 0.01], [0.3, 0.3, 0.3]]).log()
    student = torch.tensor([[0.2, 0.2, 0.2]] * 3).log()
    value = topk_divergence(student, log_probs, top_p=0.9)
    for row, k in enumerate([2, 1, 3]):
        alone = topk_divergence(student[row : row + 1, :k], log_probs[row : row + 1, :k])
        torch.testing.assert_close(value[row : row + 1], alone)


def test_an_exact_tail_beats_the_difference_from_one():
    """A student that is sure of the Top-K leaves a tail that `1 - sum` cannot resolve in float32."""
    student, teacher = torch.tensor([[0.0]]), torch.tensor([[math.log(0.9)]])
    exact = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 20.0)
    value = topk_divergence(student, teacher, student_log_tail=torch.tensor([-20.0]))
    assert float(value) == pytest.approx(exact, rel=1e-5)


def test_jsd_has_the_limits_that_the_docstring_promises():
    teacher, student = distributions(3, 4, 9, 1.0)
    log_probs, ids = teacher.topk(5)
    student = student.gather(-1, ids)
    forward, reverse = (topk_divergence(student, log_probs, divergence=kind) for kind in ("forward_kl", "reverse_kl"))
    for beta, limit in ((1e-6, forward), (1 - 1e-6, reverse)):
        value = topk_divergence(student, log_probs, divergence="jsd", beta=beta)
        torch.testing.assert_close(value / (beta * (1 - beta)), limit, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_divergences_that_would_drive_mass_off_the_support_need_the_tail(divergence):
    with pytest.raises(ValueError, match="needs `support='tail'`"):
        topk_divergence(torch.zeros(1, 1), torch.zeros(1, 1), divergence=divergence, support="renormalized")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"divergence": "kl"}, "`divergence` must be one of forward_kl, reverse_kl, jsd, but is 'kl'"),
        ({"support": "top"}, "`support` must be one of tail, renormalized"),
        ({"beta": 1.5}, "`beta` must be between 0"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
    ],
)
def test_unknown_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        topk_divergence(torch.zeros(1, 1), torch.zeros(1, 1), **setting)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="same ids"):
        topk_divergence(torch.zeros(1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="one shape"):
        TopKTargets(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="integer `ids`"):
        TopKTargets(torch.zeros(1, 1), torch.zeros(1, 1))


def test_a_line_in_the_table_is_all_that_a_new_divergence_needs(monkeypatch):
    def total_variation(student, teacher, beta):
        return (student.exp() - teacher.exp()).abs() / 2

    monkeypatch.setitem(DIVERGENCES, "total_variation", total_variation)
    student, teacher = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.2, 0.3]])
    value = topk_divergence(student.log(), teacher.log(), divergence="total_variation")
    torch.testing.assert_close(value, torch.tensor([(0.3 + 0.2 + 0.1) / 2]))

    hidden, labels = student.log()[:, [0, 1, 0]], torch.tensor([0])
    hidden[0, 2] = math.log(0.4)  # the identity as head: these are the logits
    arguments = {"sft_weight": 0.0, "kd_weight": 1.0, "divergence": "total_variation"}
    targets = TopKTargets(torch.tensor([[0, 1]]), teacher.log())
    fused = fused_linear_distillation_loss(hidden, torch.eye(3), labels, teacher=targets, **arguments)
    torch.testing.assert_close(fused.loss, value[0])
    whole = LinearTeacher(hidden, torch.eye(3))
    with pytest.raises(ValueError, match=r"must be one of forward_kl, reverse_kl, jsd; any other needs a support"):
        fused_linear_distillation_loss(hidden, torch.eye(3), labels, teacher=whole, **arguments)
