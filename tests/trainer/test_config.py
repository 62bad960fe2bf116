"""Configs check themselves, because YAML passes argparse by."""

from __future__ import annotations

import pytest

from trl_reasoning_distill.losses.divergence import DIVERGENCES
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig


def make(config_class: type = TopKDistillConfig, **values: object) -> object:
    defaults = {"output_dir": "out", "bf16": False, "use_cpu": True}
    if config_class is TopKDistillConfig:
        defaults["teacher_logits"] = "store"
    return config_class(**{**defaults, **values})


def test_defaults_are_the_published_ones() -> None:
    config = make()
    assert (config.kd_top_k, config.kd_temperature, config.kd_weight) == (10, 2.0, 0.35)
    assert (config.kd_support, config.overlong, config.use_kl_regularization, config.kl_coef) == (
        "tail",
        "drop",
        False,
        0.1,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kd_top_k": 2.7}, r"`kd_top_k=2\.7`: must be a whole number ≥ 1, found float"),
        ({"kd_top_k": True}, r"`kd_top_k=True`.*found bool"),
        ({"kd_top_k": 0}, r"`kd_top_k=0`: must be a whole number ≥ 1"),
        ({"kd_temperature": 0.0}, r"`kd_temperature=0\.0`: must be a number > 0"),
        ({"kd_weight": "0.35"}, r"`kd_weight='0\.35'`.*found str"),
        ({"kd_weight": float("nan")}, r"`kd_weight=nan`"),
        ({"kd_warmup_ratio": 1.5}, r"must be a number ≥ 0 and ≤ 1"),
        ({"kd_warmup_steps": -1}, r"`kd_warmup_steps=-1`"),
        ({"kd_divergence": "kl"}, r"`kd_divergence='kl'`: must be one of 'forward_kl', 'reverse_kl', 'jsd'"),
        ({"kd_beta": 1.0}, r"`kd_beta=1\.0`: must be a number > 0 and < 1"),
        ({"kd_top_p": 0}, r"`kd_top_p=0`"),
        ({"kd_scale_by_t2": "no"}, r"`kd_scale_by_t2='no'`: must be true or false"),
        ({"kd_divergence": "reverse_kl", "kd_support": "renormalized"}, r"drives it there. Use `kd_support: tail`"),
        (
            {"teacher_logits": None},
            r"`teacher_logits=None`: must be the path of a Top-K store. Run `trl-distill capture`",
        ),
        ({"packing": True, "packing_strategy": "wrapped"}, r"`packing_strategy='wrapped'`: must be 'bfd'"),
        ({"overlong": "cut"}, r"`overlong='cut'`: must be one of 'drop', 'truncate'"),
        ({"kl_direction": "both"}, r"`kl_direction='both'`"),
        ({"kl_coef": -0.1}, r"`kl_coef=-0\.1`"),
        ({"kl_target": 0.1}, r"`kl_target=0\.1` without the KL term: set use_kl_regularization: true"),
        ({"reference_logits": "x"}, r"`reference_logits='x'` without the KL term"),
        ({"use_kl_regularization": True, "kl_target": 0.0}, r"`kl_target=0\.0`: must be a number > 0"),
        ({"use_kl_regularization": True, "kl_target": 1.0, "kl_coef": 0.0}, r"`kl_coef=0\.0`: must be a number > 0"),
        (
            {"use_kl_regularization": True, "reference_logits": True},
            r"`reference_logits=True`: must be text, found bool",
        ),
        ({"reasoning_format": "thnik"}, r"Did you mean 'think'"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor=0\.1`: must be 0.*never builds"),
    ],
)
def test_refuses_with_field_value_and_remedy(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_a_divergence_that_the_table_has_is_one_that_a_config_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIVERGENCES, "mine", lambda student, teacher, beta: student - teacher)
    assert make(kd_divergence="mine").kd_divergence == "mine"


def test_every_field_of_ours_has_help_and_its_default_is_valid() -> None:
    for config_class in (ReasoningSFTConfig, TopKDistillConfig):
        for name in vars(config_class)["__annotations__"]:
            assert config_class.__dataclass_fields__[name].metadata["help"], name


def test_names_of_0_1_are_taken_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="`top_k` is called `kd_top_k` now"):
        assert make(top_k=7).kd_top_k == 7
    with pytest.warns(FutureWarning, match="`teacher_tokenizer_name_or_path` is called `teacher_tokenizer` now"):
        assert make(TopKGKDConfig, teacher_tokenizer_name_or_path="x").teacher_tokenizer == "x"
