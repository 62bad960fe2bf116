"""Heads as training loops hold them: tied to the embedding, sharded, gathered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.losses.cases import live_teacher, problem, to
from trl_reasoning_distill.losses.fused import fused_linear_distillation_loss


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    """One process that is a group of its own."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_tied_head_gets_the_gradient_of_both_its_uses(device):
    case = problem()
    inputs = torch.tensor([1, 3, 3, 0, 10, 2], device=device)
    labels = case.labels.to(device)
    weight = case.weight.to(device).requires_grad_()
    fused_linear_distillation_loss(weight[inputs].tanh(), weight, labels).loss.backward()
    dense = case.weight.to(device).requires_grad_()
    logits = dense[inputs].tanh() @ dense.T
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, dense.grad)


def test_a_sharded_head_is_refused_and_gathered_it_gets_its_sharded_gradient(mesh):
    """As FSDP2 holds it: the trainer passes `weight.full_tensor()`."""
    case = problem()
    sharded = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    with pytest.raises(ValueError, match=r"`weight` is a sharded DTensor; pass `weight.full_tensor\(\)`"):
        fused_linear_distillation_loss(case.hidden, sharded, case.labels)
    teacher = live_teacher(top_k=3)
    teacher = dataclasses.replace(teacher, weight=distribute_tensor(teacher.weight, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"`teacher.weight` is a sharded DTensor"):
        fused_linear_distillation_loss(case.hidden, case.weight, case.labels, teacher=teacher)

    fused_linear_distillation_loss(case.hidden, sharded.full_tensor(), case.labels).loss.backward()
    whole = case.weight.clone().requires_grad_()
    fused_linear_distillation_loss(case.hidden, whole, case.labels).loss.backward()
    assert isinstance(sharded.grad, DTensor)
    torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)


@pytest.mark.parametrize("top_k", [3, None])
def test_both_heads_may_be_released_before_the_backward_pass(device, top_k):
    """As under ZeRO-3, where they are gathered around the call only."""
    case = problem()
    case.teacher = live_teacher(top_k=top_k)
    expected = case.run(device=device)[1]
    hidden, weight, bias = (x.detach().to(device).requires_grad_() for x in case.parameters)
    teacher = to(case.teacher, device, torch.float64)
    teacher_weight = teacher.weight.clone()
    teacher = dataclasses.replace(teacher, weight=teacher_weight)
    loss = fused_linear_distillation_loss(
        hidden,
        weight,
        case.labels.to(device),
        bias=bias,
        teacher=teacher,
        reference=to(case.reference, device, torch.float64),
        **{name: value.to(device) for name, value in case.weights.items()},
        **case.settings,
    ).loss
    for one in (weight, teacher_weight):
        one.untyped_storage().resize_(0)
    torch.testing.assert_close(list(torch.autograd.grad(loss, [hidden, weight, bias])), expected)
