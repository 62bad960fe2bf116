"""The model card: TRL's, and what a reader of a distilled model asks beside it.

How to ask it, what it was trained on, by whom it was taught, with which settings, how well that went, and with which versions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from trl_reasoning_distill.data.formatting import ReasoningFormat

Facts = Mapping[str, Any]
_HEADING, _PROCEDURE = "## Quick start", "### Framework versions"
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "num_train_epochs",
    "max_length",
    "packing",
    "think_weight",
    "answer_weight",
    "seed",
)
_ADAPTER_SETTINGS = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "virtual tokens": "num_virtual_tokens",
}
_PACKAGES = ("trl_reasoning_distill", "peft", "accelerate")


def extend_card(path: Path, *, quick_start: str, sections: Mapping[str, Facts]) -> None:
    """Put a quick start and tables of facts into a card that TRL wrote.

    Args:
        path: The card.
        quick_start: Markdown in place of TRL's quick start.
        sections: Heading to facts, in front of the versions of packages; an empty one is left out.
    """
    card = path.read_text(encoding="utf-8")
    # A base from a folder has no page on the hub
    card = card.replace("[None](https://huggingface.co/None)", "a model in a local folder")
    head, _, rest = card.partition(_HEADING)
    _, _, rest = rest.partition("## Training procedure")
    rest = f"## Training procedure{rest}"
    tables = "\n\n".join(f"### {heading}\n\n{_table(facts)}" for heading, facts in sections.items() if facts)
    before, _, after = rest.partition(_PROCEDURE)
    versions = "\n".join(f"- {name}: {version(name)}" for name in _PACKAGES)
    path.write_text(
        f"{head}{_HEADING}\n\n{quick_start}\n\n{before}{tables}\n\n{_PROCEDURE}\n\n{versions}\n{after.lstrip()}",
        encoding="utf-8",
    )


def quick_start(trainer: Any, form: ReasoningFormat) -> str:
    """How to ask the model: with the messages of its own format, and what its answers look like."""
    name = trainer.hub_model_id or str(trainer.args.output_dir)
    messages = form.messages("What is 15 % of 240?")
    kwargs = trainer.args.template_variables
    options = f", tokenizer_encode_kwargs={kwargs!r}" if kwargs else ""
    example = form.render("First the reasoning.", "36")
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{name}", device_map="auto")\n'
        f"messages = {messages!r}\n"
        f"output = generator(messages, max_new_tokens=1024, return_full_text=False{options})[0]\n"
        'print(output["generated_text"])\n```\n\n'
        f"It answers in the format `{form.name}`:\n\n```text\n{example}\n```"
    )


def training_facts(trainer: Any) -> dict[str, Facts]:
    """Data, settings and metrics of a `ReasoningSFTTrainer`."""
    args, report = trainer.args, trainer.reports.get("train")
    world = trainer.accelerator.num_processes
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    data = {} if report is None else {
        "rows": f"{report.rows:,}",
        "with reasoning": f"{report.with_reasoning / max(1, report.rows):.1%}",
        "supervised tokens": f"{report.supervised_tokens:,}",
        "left out": f"{report.overlong:,} too long, {report.unsupervised:,} without a supervised token, {len(report.malformed):,} with a "
        "malformed thought",
    }  # fmt: skip
    values = {name: getattr(args, name, None) for name in _SETTINGS}
    settings = {name: getattr(value, "value", value) for name, value in values.items() if value is not None}
    if args.max_steps > 0:
        del settings["num_train_epochs"]
    settings["batch"] = (
        f"{per_step} ({args.per_device_train_batch_size} per device × {args.gradient_accumulation_steps} accumulated × {world} processes)"
    )
    settings |= _adapter(trainer.model)
    if args.use_kl_regularization:
        settings["KL to the reference"] = f"{args.kl_direction}, coefficient {args.kl_coef}"
    return {
        "Run": {
            "recipe and stage": "/".join(Path(args.output_dir).parts[-2:]),
            "base model": _base_model(trainer.model),
        },
        "Data": data,
        "Settings": settings,
        "Metrics": _metrics(trainer.state),
    }


def _adapter(model: Any) -> dict[str, Any]:
    if not is_peft_model(model):
        return {"trained": "all weights"}
    config = model.active_peft_config
    kind = str(config.peft_type.value)
    facts = {"trained": f"{kind} adapter"}
    # Each kind of adapter has other settings
    found = {label: getattr(config, name, None) for label, name in _ADAPTER_SETTINGS.items()}
    settings = [f"{label} {value}" for label, value in found.items() if value is not None]
    modules = getattr(config, "target_modules", None)
    settings += [f"on {modules if isinstance(modules, str) else sorted(modules)}"] if modules else []
    if settings:
        facts["LoRA" if kind == "LORA" else kind] = ", ".join(settings)
    bits = [bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)]
    return facts | ({"base quantised to": f"{bits[0]} bits while training"} if bits else {})


def _base_model(model: Any) -> str:
    name = Path(model.config.name_or_path)
    return f"a local folder, {name.name}" if name.is_dir() else str(name)


def _metrics(state: Any) -> dict[str, Any]:
    """The last value of each metric that was logged, and the best one where there is such."""
    last: dict[str, Any] = {}
    for entry in state.log_history:
        last |= entry
    last.pop("train_loss", None)  # of the steps since the last resumption alone
    names = sorted(name for name in last if name.endswith("loss") or name.startswith("eval_math"))
    facts: dict[str, Any] = {"steps": f"{state.global_step:,}"}
    facts |= {name: f"{last[name]:.4f}" for name in names if not math.isnan(last[name])}
    if state.best_metric is not None:
        facts["best"] = f"{state.best_metric:.4f} at step {state.best_global_step:,}"
    return facts


def _table(facts: Facts) -> str:
    rows = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items())
    return "\n".join(["| | |", "|---|---|", *rows])
