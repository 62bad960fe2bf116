"""A model's language-model head: the one reading of it, the logits it makes, and the proof that they are the model's own.

A loss or a capture that makes logits itself must apply what the model's forward applies: a bias, a factor, a soft-cap. Families
name these differently in their configs, and some do more than that to their hidden states. So `Head.of` reads the names that
are known, and `prove_head` compares the result with the model's own logits before anything is computed from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trl_reasoning_distill.losses import _kernels, _matmul
from trl_reasoning_distill.losses.divergence import accumulator

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_FACTORS = (
    "logit_scale",  # Cohere
    "output_multiplier",
    "lm_head_multiplier",  # Falcon-H1
)
_DIVISORS = (
    "logits_scaling",  # Granite; MiniCPM3 divides its hidden states by it, which is the same
    "logits_mup_width_multiplier",  # Inkling, likewise
)
_FACTORS_NAMED_AS_DIVISORS = {"hyperclovax": "logits_scaling"}
_SOFTCAPS = (
    "final_logit_softcapping",  # Gemma 2, 3 and 4, VaultGemma, NanoChat
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)

# The proof: tokens that are read, and how large their logits are made, so that a soft-cap shows in any model.
_PROOF_TOKENS, _PROOF_LOGITS, _PROOF_HIDDEN = 8, 64.0, 1e4


class Head(NamedTuple):
    """A language-model head: `softcap(logit_scale * (hidden @ weight.T + bias))`."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    logit_scale: float
    logit_softcap: float | None

    @classmethod
    def of(cls, model: Any, layer: nn.Module | None = None) -> Head:
        """The head of a causal language model of `transformers`, by the names that its config gives the transform.

        What is read here is a claim; `prove_head` tests it.

        Args:
            model: The model; under PEFT, the base model.
            layer: The output layer to take the weight and bias from, in place of the model's.

        Raises:
            ValueError: If there is no output layer with a weight, or an adapter changes that layer.
        """
        layer = model.get_output_embeddings() if layer is None else layer
        weight: Any = getattr(layer, "weight", None)
        if weight is None:
            raise ValueError(
                f"{_name(model)} has no single output layer with a weight: its logits cannot be made here."
            )
        if hasattr(layer, "base_layer"):
            raise ValueError(
                f"An adapter changes the output layer of {_name(model)} (a {type(layer).__name__}), but the logits are made from its "
                "weight alone. Leave the layer out of `target_modules`; to train it, name it in `modules_to_save`."
            )
        config = model.config.get_text_config()
        scale = 1.0
        for name in (*_FACTORS, *_DIVISORS):
            value = getattr(config, name, None)
            if value is not None:
                is_factor = name in _FACTORS or _FACTORS_NAMED_AS_DIVISORS.get(config.model_type) == name
                scale *= float(value) if is_factor else 1 / float(value)
        softcaps = (getattr(config, name, None) for name in _SOFTCAPS)
        softcap = next((float(cap) for cap in softcaps if cap is not None), None)
        return cls(weight, getattr(layer, "bias", None), scale, softcap)

    def first(self, vocab: int, dtype: torch.dtype) -> Head:
        """The same for the first ids only, in the dtype of the matmul."""
        bias = None if self.bias is None else self.bias.detach()[:vocab].to(dtype)
        return self._replace(weight=self.weight.detach()[:vocab].to(dtype), bias=bias)

    def logits(
        self, hidden: Float[Tensor, "tokens hidden"], *, in_float32: bool = False
    ) -> Float[Tensor, "tokens vocab"]:
        """The logits as the model's own forward pass rounds them, or `in_float32`, where 16 bits do not tell two models apart."""
        weight, bias = self.weight, self.bias
        if in_float32 and hidden.dtype != accumulator(hidden.dtype):
            logits = _matmul.product(hidden, weight.t())
            if bias is not None:
                logits += bias
        else:
            logits = torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())
        return self.transform_(logits)

    def named_logits(
        self,
        logits: Float[Tensor, "tokens vocab"],
        hidden: Float[Tensor, "tokens hidden"],
        ids: Int[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens k"]:
        """Some of the logits in float32: taken from the tile, or computed anew where it has rounded them to 16 bits.

        At |z| = 16 bfloat16 knows a logit to 0.06. The sum over a vocabulary forgives that, its few likely tokens do not.
        """
        dtype = accumulator(logits.dtype)
        if logits.dtype == dtype:
            return logits.gather(1, ids)
        gather: Any = _kernels.kernels("gather", logits.device.type, logits.dtype)
        named = (gather or _matmul).named_products(self.weight, hidden, ids)
        if self.bias is not None:
            named += self.bias[ids].to(dtype)
        return self.transform_(named)

    def fused_logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """The logits as the fused loss makes them: in autocast's dtype, else in that of the hidden states; without a graph."""
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            return self.first(len(self.weight), dtype).logits(hidden.detach().to(self.weight.device, dtype))

    def transform_(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap a projection, in place."""
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.logit_softcap is not None:
            logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of these logits with respect to the projection: of `cap * tanh(x / cap)` it is `1 - (z / cap)²`."""
        if self.logit_softcap is None:
            return self.logit_scale
        return self.logit_scale * (1 - (logits / self.logit_softcap).square())


def body_of(model: Any) -> nn.Module:
    """The part of a causal language model that ends in `last_hidden_state`, which its head reads.

    Raises:
        ValueError: If there is none.
    """
    # Llama 4's text model names a prefix that is none of its attributes, so that `base_model` is the model itself.
    for body in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if isinstance(body, nn.Module) and body is not model:
            return body
    raise ValueError(f"{_name(model)} has no part that ends in hidden states: its logits cannot be made here.")


def input_device(model: Any) -> torch.device:
    """Where a model wants its ids. Offloaded weights are on `meta` until accelerate's hook brings them to where they are used."""
    if model.device.type != "meta":
        return model.device
    return torch.device(model.get_input_embeddings()._hf_hook.execution_device)


@torch.no_grad()
def prove_head(model: Any, body: nn.Module | None = None, logits_of: Callable[[Tensor], Tensor] | None = None) -> None:
    """Compare the logits that are made from a model's hidden states with those of its own forward, on a few tokens.

    The hidden states are enlarged until the logits reach 64: small ones would pass through a soft-cap unchanged.

    Args:
        model: A causal language model; under PEFT, the base model. No parameter may be sharded or on `meta`.
        body: Makes the hidden states; by default `body_of(model)`.
        logits_of: Makes logits `(tokens, vocab)` from hidden states `(tokens, hidden)`; by default those of `Head.of(model)`.

    Raises:
        ValueError: If the two differ by more than rounding, with both figures; or if the model cannot be run so.
    """
    body = body_of(model) if body is None else body
    logits_of = Head.of(model).fused_logits if logits_of is None else logits_of
    layer = model.get_output_embeddings()
    ids = torch.arange(1, 1 + _PROOF_TOKENS)[None] % model.config.get_text_config().vocab_size
    ids = ids.to(input_device(model))
    with _evaluating(model), torch.random.fork_rng(devices=[]):
        try:
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state[0]
            gain = _gain(hidden, logits_of(hidden))
            with _enlarged_input(layer, gain):
                own = model(input_ids=ids, use_cache=False).logits[0]
            ours = logits_of(hidden * gain)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The logits of {_name(model)} cannot be made from its last hidden state and its output layer: {type(error).__name__}: "
                f"{error}. Please report this architecture."
            ) from error
    _compare(model, own[:, : ours.shape[-1]], ours)


def _gain(hidden: Tensor, logits: Tensor) -> float:
    """A power of two, so that it rounds nothing."""
    largest, widest = logits.abs().max().item(), hidden.abs().max().item()
    if not 0 < largest < float("inf"):
        return 1.0
    gain = min(_PROOF_LOGITS / largest, _PROOF_HIDDEN / widest)
    return max(1.0, 2.0 ** torch.tensor(gain).log2().floor().item())


@contextlib.contextmanager
def _enlarged_input(layer: nn.Module, gain: float) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gain, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def _compare(model: Any, own: Tensor, ours: Tensor) -> None:
    if own.shape != ours.shape:
        raise ValueError(
            f"{_name(model)} gives logits of shape {tuple(own.shape)} for {len(own)} tokens, but its output layer gives "
            f"{tuple(ours.shape)}: what it does to them is not known here. Please report this architecture."
        )
    own, ours = own.float(), ours.to(own.device).float()
    difference = (own - ours).abs()
    # Logits in 16 bits are rounded to 1/128 of their size; a missing factor or cap shows far above that.
    is_exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    is_exact = is_exact and not torch.is_autocast_enabled(own.device.type)
    tolerance = (1e-3 if is_exact else 0.05) * max(1.0, own.abs().max().item())
    worst = int(difference.nan_to_num(nan=torch.inf).argmax())
    if not difference.flatten()[worst] <= tolerance:
        raise ValueError(
            f"{_name(model)} does something to its logits that is not known here: one is {own.flatten()[worst]:.6g} in its own forward, "
            f"but {ours.flatten()[worst]:.6g} from its last hidden state and its output layer. Please report this architecture."
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _name(model: Any) -> str:
    path = getattr(model.config, "name_or_path", "")
    return f"{path} ({type(model).__name__})" if path else type(model).__name__
