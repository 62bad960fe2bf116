"""What goes wrong in silence, looked for before it can. What a stage refuses itself is not looked for again: its own check is asked."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.chat import render_prompt
from trl_reasoning_distill.data.decontamination import NGRAM, Decontaminator
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.row_check import RowCheck
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.data.synthetic import SOURCE_NAME as SYNTHETIC
from trl_reasoning_distill.data.tokenization import is_supervised, tokenize_example
from trl_reasoning_distill.doctor.stages import ExaminedStage, Finding, Level, Resources, UnknownModelError
from trl_reasoning_distill.scripts.planning import Plan
from trl_reasoning_distill.scripts.training import check_evaluation
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary, map_vocabulary

_QUESTION, _REASONING, _ANSWER = "What is (2 + 3) * 4?", "First 2 + 3 = 5. Then 5 * 4 = 20.", "20"
_WARNING_SHARE, _LIMIT_SHARE = 0.01, 0.5  # of rows that are left out
_WHOLE_QUESTION = 10_000  # words
MOST_COMPARED = 5000
"""Problems of a source that are compared with those of the test."""

Found = Iterator[tuple[Level, str]]
Check = Callable[[ExaminedStage, Resources], Found]


def check_stage(stage: ExaminedStage, resources: Resources) -> list[Finding]:
    """Everything that can be found in one stage by itself."""
    checks: list[Check] = [check_models, check_extras, check_output]
    if stage.is_training:
        checks += [check_evaluations, check_template]
    found: list[Finding] = []
    for check in checks:
        try:
            found += [Finding(level, stage.name, message) for level, message in check(stage, resources)]
        except UnknownModelError:  # check_models has found it
            continue
    return found


def check_recipe(stages: Sequence[ExaminedStage], resources: Resources) -> list[Finding]:
    """What only shows between stages: do teacher and student agree, are training and test apart, is the control fair?"""
    found: list[Finding] = []
    for check in (check_vocabularies, check_contamination, check_control):
        try:
            found += check(stages, resources)
        except UnknownModelError as error:
            found.append(Finding("yellow", "recipe", f"{check.__doc__ or ''} Not checked: {error}."))
    return found


def check_models(stage: ExaminedStage, resources: Resources) -> Found:
    """Can configuration and tokenizer be had; is a hub model's own code asked for?"""
    for role, served in stage.served.items():
        yield "green", f"{role} is {served.model} at {served.url}: no memory is needed for it here."
        if not os.environ.get(served.key_variable):
            yield (
                "yellow",
                f"${served.key_variable} is not set: a hosted server refuses {role} without its key; one of your own may not ask for it.",
            )
    for role, model in stage.models.items():
        if not model:
            yield "red", f"no {role} is named."
        elif not any(Path(model).is_relative_to(stage.run_folder / earlier) for earlier in stage.waits_for):
            try:
                resources.config(model)
                resources.tokenizer(model)
            except UnknownModelError as error:
                yield "yellow", f"{role}: its configuration cannot be had here, so it is not checked ({error})."
    if stage.get("trust_remote_code"):
        yield "yellow", "trust_remote_code is on: code that comes with the model runs on this machine."


def check_extras(stage: ExaminedStage, resources: Resources) -> Found:
    """Is everything installed that the options ask for?"""
    quantises = any(stage.get(name) for name in ("load_in_4bit", "load_in_8bit", "quantization"))
    optimizer = str(stage.get("optim"))
    needs = {
        ("bitsandbytes", "quantization"): quantises or "8bit" in optimizer or "paged" in optimizer,
        ("vllm", "vllm"): stage.get("engine") == "vllm",
        ("openai", "server"): bool(stage.served),
    }
    for (module, extra), is_needed in needs.items():
        if is_needed and importlib.util.find_spec(module) is None:
            yield "red", f"{module} is not installed: pip install 'trl-reasoning-distill[{extra}]'."


def check_output(stage: ExaminedStage, resources: Resources) -> Found:
    """Is the output folder free, or this recipe's own?"""
    folder = stage.item.output_dir
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        yield "yellow", f"{folder} holds an unfinished run; it goes on there if the options are the same."
        return
    yield (
        "yellow",
        f"{folder} holds a finished {manifest.stage} ({manifest.result}); it is used as it is, or refused if options changed.",
    )


def check_evaluations(stage: ExaminedStage, resources: Resources) -> Found:
    """Does a training that evaluates have rows to evaluate?"""
    data, config, _, accuracy = stage.parts
    try:
        check_evaluation(data, config, accuracy)
    except ValueError as error:
        yield "red", str(error)


def check_template(stage: ExaminedStage, resources: Resources) -> Found:
    """Do padding and template leave the reasoning and the end token alone?"""
    tokenizer = resources.tokenizer(stage.get("model_name_or_path"), stage.get("chat_template_path"))
    if tokenizer.eos_token_id is None:
        yield "red", "the student's tokenizer has no EOS token: the model could never learn to stop."
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield "green", "padding is the EOS token; only padding is masked, the completion's own EOS is trained on."
    if tokenizer.chat_template is not None:
        form = ReasoningFormat.preset(stage.get("reasoning_format"))
        yield _judge_template(tokenizer, form, dict(stage.get("chat_template_kwargs") or {}))


def _judge_template(tokenizer: Any, form: ReasoningFormat, options: dict[str, Any]) -> tuple[Level, str]:
    """What becomes of one chain of thought."""
    question = [{"role": "user", "content": _QUESTION}]
    completion = [{"role": "assistant", "content": form.render(_REASONING, _ANSWER)}]
    prompt = render_prompt(tokenizer, question, **options)
    if form.close_tag and prompt.rstrip().endswith(form.close_tag):
        return (
            "red",
            f"the chat template ends its prompt with a closed {form.open_tag}…{form.close_tag}: the student would be asked not to think. Set "
            'chat_template_kwargs to {"enable_thinking": true}, or give another chat_template_path.',
        )
    row = {"prompt": question, "completion": completion}
    tokens = tokenize_example(tokenizer, row, chat_template_kwargs=options)
    supervised = [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if is_supervised(label)]
    if damage := RowCheck(tokenizer, form)(row, tokens).damage:
        loses = damage.startswith(("drops", "doubles"))
        what = f"drops or doubles {form.open_tag or 'the reasoning'}" if loses else "changes what is trained"
        return "red", f"the chat template {what}: it {damage}. Give another chat_template_path."
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in supervised:
        return (
            "yellow",
            f"the chat template ends the assistant's turn without {tokenizer.eos_token!r}: check that generation stops at what it ends with.",
        )
    return "green", "the chat template keeps the reasoning whole and ends with EOS."


def check_left_out(stage: ExaminedStage, plan: Plan) -> list[Finding]:
    """How many rows the stage's own plan leaves out."""
    found = []
    for why, count in plan.left_out.items():
        share = count / max(1, plan.looked_at)
        if share > _WARNING_SHARE:
            level: Level = "red" if share > _LIMIT_SHARE else "yellow"
            message = f"{count:,} of {plan.looked_at:,} rows are {why}, and would be left out."
            found.append(Finding(level, stage.name, message))
    return found


def check_vocabularies(stages: Sequence[ExaminedStage], resources: Resources) -> Iterator[Finding]:
    """Teacher's and student's vocabulary."""
    captures = [stage for stage in stages if stage.item.script == "capture"]
    aligned = any(stage.item.script == "align" for stage in stages)
    for distill in (stage for stage in stages if stage.item.script == "distill"):
        for capture in captures:
            names = (capture.get("teacher_tokenizer") or capture.get("teacher"), distill.get("model_name_or_path"))
            vocabularies = [Vocabulary(resources.tokenizer(name)) for name in names]
            mapped = map_vocabulary(vocabularies[0], vocabularies[1])
            same = all(int(twin) == i for i, twin in enumerate(mapped) if i in vocabularies[0].bytes_of)
            if same:
                yield Finding("green", distill.name, "teacher and student have one tokenizer.")
            elif aligned:
                text = "teacher and student have different tokenizers, and the recipe aligns them."
                yield Finding("green", distill.name, text)
            else:
                yield Finding(
                    "red",
                    distill.name,
                    f"teacher and student have different tokenizers ({float((mapped >= 0).mean()):.0%} of the teacher's tokens have a twin): "
                    "add the stage align between capture and distill.",
                )


def check_contamination(stages: Sequence[ExaminedStage], resources: Resources) -> Iterator[Finding]:
    """Training and test problems: the same part of one source, or, where both are at hand, questions that share 13 words."""
    made = [stage for stage in stages if stage.item.script == "generate"]
    trained = made or [stage for stage in stages if stage.is_training and stage.sample][:1]
    for stage in (stage for stage in stages if stage.item.script == "evaluate"):
        name = f"{stage.get('source')}, split {stage.get('split')!r}"
        for source in trained:
            same = all(source.get(key) == stage.get(key) for key in ("source", "split"))
            shared = 0 if same else _count_shared(source, stage)
            if same:
                yield Finding("red", stage.name, f"tests on {name}: the very problems that are trained on.")
            elif shared:
                yield Finding(
                    "red",
                    stage.name,
                    f"{shared:,} problems of {source.name} stand in {name}, or share 13 words with it: leave them out with `data prepare`.",
                )
            elif shared == 0:
                yield Finding("green", stage.name, f"no problem of {source.name} stands in {name}.")


def _count_shared(trained: ExaminedStage, tested: ExaminedStage) -> int | None:
    """How many problems to train on stand among those of the test; `None` where one of the two is not on this machine."""
    problems, test = _local_problems(trained), _local_problems(tested)
    if problems is None or test is None:
        return None
    # The questions of a synthetic source share their wording, not their numbers
    is_synthetic = SYNTHETIC in (trained.get("source"), tested.get("source"))
    stands_in_test = Decontaminator({tested.name: test}, ngram=_WHOLE_QUESTION if is_synthetic else NGRAM)
    return sum(stands_in_test(problem) is not None for problem in problems)


def _local_problems(stage: ExaminedStage) -> list[Problem] | None:
    """The problems that a stage asks, or the prompts that it trains on, if they are on this machine."""
    if stage.is_training:
        prompts = enumerate(stage.prompts, start=1)
        return [Problem(f"row {number}", prompt, None, stage.name) for number, prompt in prompts]
    source, data_dir = str(stage.get("source")), stage.get("data_dir")
    options = dict(stage.get("source_options") or {}) | ({"data_dir": data_dir} if data_dir else {})
    if not (Path(source).exists() or source == SYNTHETIC or options.get("data_dir")):
        return None
    limit = min(stage.get("limit") or MOST_COMPARED, MOST_COMPARED)
    try:
        return load_problems(source, split=stage.get("split"), limit=limit, seed=stage.get("problem_seed"), **options)
    except (ValueError, FileNotFoundError):  # the stage's own plan finds it
        return None


_SAME_IN_BOTH = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "dataset_path", "limit", "seed"),
)


def check_control(stages: Sequence[ExaminedStage], resources: Resources) -> Iterator[Finding]:
    """The SFT control's budget."""
    trainings = {stage.item.script: stage for stage in stages if stage.item.script in ("sft", "distill")}
    if set(trainings) != {"sft", "distill"}:
        return
    sft, distill = trainings["sft"], trainings["distill"]
    if str(distill.get("model_name_or_path")).startswith(str(sft.item.output_dir)):
        return  # distillation goes on from the SFT model: stages of one student, not arms of a comparison
    differing = [name for name in _SAME_IN_BOTH if sft.get(name) != distill.get(name)]
    if differing:
        text = f"the SFT control differs in {', '.join(differing)}: a difference in accuracy would not be distillation's alone."
        yield Finding("yellow", distill.name, text)
    else:
        yield Finding("green", distill.name, "the SFT control has the same rows, steps and batch.")


def check_disk(folder: Path, needed: int) -> Finding:
    """Is there enough disk for what the recipe writes?"""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    level: Level = "red" if needed > free else "yellow" if needed > 0.8 * free else "green"
    text = f"about {needed / 2**30:.1f} GiB of disk are needed, {free / 2**30:.1f} GiB are free at {folder}."
    return Finding(level, "recipe", text)
