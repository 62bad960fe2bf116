"""Half precision: as exact as all logits in memory with a gradient scaler, and where two models are all but equal."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.losses.cases import WEIGHTS, Case, relative_error, topk_targets
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import LinearReference, LinearTeacher, fused_linear_distillation_loss

SCALER = 65536.0


def randn(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(tokens: int, width: int, vocab: int, seed: int = 0) -> Case:
    """A student that knows something, with each token's weight divided by a large global batch."""
    weight = randn(seed, vocab, width, scale=0.1)
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    hidden = randn(seed + 1, tokens, width) + 4 * weight[labels]
    return Case(
        hidden=hidden,
        weight=weight,
        bias=randn(seed + 2, vocab, scale=0.1),
        labels=labels,
        teacher=topk_targets(hidden @ weight.T + randn(seed + 3, tokens, vocab, scale=0.5), 10, 2.0),
        reference=None,
        weights={name: torch.full((tokens,), 1 / 65536, dtype=torch.float64) for name in WEIGHTS},
        settings={"temperature": 2.0},
    )


def scaled_gradients(case: Case, dtype: torch.dtype, device: torch.device, **settings: object) -> list[torch.Tensor]:
    """As `GradScaler` makes and undoes them."""
    leaves = [parameter.to(device, dtype).requires_grad_() for parameter in case.parameters]
    assert isinstance(case.teacher, TopKTargets)
    loss = fused_linear_distillation_loss(
        *leaves[:2],
        case.labels.to(device),
        bias=leaves[2],
        teacher=TopKTargets(case.teacher.ids.to(device), case.teacher.log_probs.float().to(device)),
        **{name: weight.to(device) for name, weight in case.weights.items()},
        **case.settings,
        **settings,
    ).loss
    return [grad.double() / SCALER for grad in torch.autograd.grad(loss * SCALER, leaves)]


@pytest.mark.parametrize("chunk_size", [None, 12])
def test_float16_keeps_the_gradient_of_a_large_batch(device, chunk_size):
    case = trained(32, 32, 800)
    grads = scaled_gradients(case, torch.float16, device, chunk_size=chunk_size)
    expected = case.expected(torch.float16)[1]
    assert max(map(relative_error, grads, expected)) < 1e-3
    rows = grads[1].abs().sum(1) == 0
    assert rows.double().mean() < 0.01


def test_float16_does_not_overflow_where_many_tokens_add_up(device):
    """The gradient of one row of the head is the sum of 4,096 tokens, which all have the same label and large hidden states."""
    tokens, width, vocab = 4096, 8, 50
    hidden = 40 + randn(0, tokens, width)
    weight, labels = randn(1, vocab, width, scale=1e-3), torch.full((tokens,), 7)
    leaves = [x.to(device, torch.float16).requires_grad_() for x in (hidden, weight)]
    loss = fused_linear_distillation_loss(*leaves, labels.to(device), sft_weight=1 / tokens).loss
    grads = torch.autograd.grad(loss, leaves)
    exact = [x.half().double().requires_grad_() for x in (hidden, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels).backward()
    assert relative_error(grads[1], exact[1].grad) < 1e-3


def test_float16_of_no_weight_is_zero(device):
    case = trained(4, 8, 30)
    case.weights = {name: torch.zeros(4, dtype=torch.float64) for name in WEIGHTS}
    assert all(not grad.any() for grad in scaled_gradients(case, torch.float16, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_do_not_depend_on_the_unit_of_the_weights(device, dtype):
    """Their exponents reach far enough; a power of two changes no digit."""
    case = trained(16, 16, 101)
    grads = scaled_gradients(case, dtype, device)
    case.weights = {name: weight * 2.0**16 for name, weight in case.weights.items()}
    for small, large in zip(grads, scaled_gradients(case, dtype, device), strict=True):
        assert torch.equal(small * 2.0**16, large)


# Models that are all but equal: the difference of their logits is below the step of 16 bits.


def near(kind: str, dtype: torch.dtype, noise: float, **settings: object) -> Case:
    """A student beside a model that differs from it by `noise` in its hidden states; both rounded, so that all that is measured is arithmetic."""
    tokens, width, vocab = 12, 64, 300
    weight = randn(0, vocab, width, scale=0.25).to(dtype).double()
    hidden = randn(1, tokens, width).to(dtype)
    other = (hidden.double() + randn(2, tokens, width, scale=noise)).to(dtype).double()
    only = {"teacher": "kd_weight", "reference": "kl_weight"}[kind]
    return Case(
        hidden=hidden.double(),
        weight=weight,
        bias=None,
        labels=torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3)),
        teacher=LinearTeacher(other, weight) if kind == "teacher" else None,
        reference=LinearReference(other, weight) if kind == "reference" else None,
        weights={name: torch.full((tokens,), float(name == only), dtype=torch.float64) for name in WEIGHTS},
        settings=dict(settings),
    )


@pytest.mark.parametrize("noise", [0.02, 0.1])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("teacher", {"divergence": "forward_kl"}),
        ("teacher", {"divergence": "reverse_kl", "temperature": 2.0}),
        ("teacher", {"divergence": "jsd", "chunk_size": 5}),
        ("reference", {"kl_direction": "reverse"}),
        ("reference", {"kl_direction": "forward"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_divergence_of_two_close_models_is_not_the_rounding_of_their_logits(device, kind, settings, noise, dtype):
    case = near(kind, dtype, noise, **settings)
    out, grads = case.run(dtype, device)
    parts, expected = case.expected(dtype)
    value, exact = (out.kd, parts["kd"]) if kind == "teacher" else (out.kl, parts["kl"])
    assert exact.mean() < 0.3 if noise == 0.1 else exact.mean() < 0.01
    assert relative_error(value, exact) < 0.01
    assert max(map(relative_error, grads, expected)) < 0.01


def test_a_live_teacher_that_is_sure_has_a_tail_that_does_not_underflow(device):
    """All else is 120 nats below its first token: e^-120 is no float32."""
    teacher_weight = torch.tensor([[0.0], [-120.0], [-121.0], [-125.0]], dtype=torch.float64)
    case = Case(
        hidden=torch.ones(1, 1, dtype=torch.float64),
        weight=torch.tensor([[0.0], [-1.0], [-2.0], [-1.0]], dtype=torch.float64),
        bias=None,
        labels=torch.tensor([0]),
        teacher=LinearTeacher(torch.ones(1, 1, dtype=torch.float64), teacher_weight, top_k=1),
        reference=None,
        weights={name: torch.ones(1, dtype=torch.float64) for name in WEIGHTS},
        settings={"divergence": "reverse_kl"},
    )
    out, grads = case.run(torch.float32, device)
    parts, expected = case.expected(torch.float32)
    assert parts["kd"] > 30
    torch.testing.assert_close(out.kd.cpu().double(), parts["kd"], rtol=1e-6, atol=0)
    assert max(map(relative_error, grads, expected)) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_tokens_that_a_bias_of_minus_infinity_removes_are_not_there(device, temperature):
    """As padding rows are masked by some models: among the named tokens, among the rest, and all of the rest."""
    case = trained(6, 8, 40)
    case.settings["temperature"] = temperature
    case.labels %= 20
    case.teacher = topk_targets(randn(5, 6, 20), 3, temperature)
    without = dataclasses.replace(case, weight=case.weight[:20], bias=case.bias[:20])
    case.bias[20:] = -torch.inf
    case.teacher = TopKTargets(
        torch.cat([case.teacher.ids, torch.full((6, 1), 25)], 1),
        torch.cat([case.teacher.log_probs, torch.full((6, 1), -1e9, dtype=torch.float64)], 1),
    )
    out, grads = case.run(torch.float32, device)
    expected, expected_grads = without.run(torch.float32, device)
    for name in ("loss", "nll", "kd", "entropy", "is_top1", "student_mass"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), msg=name)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[1][:20], expected_grads[1])
    assert not grads[1][20:].any()
