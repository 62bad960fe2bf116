"""What goes wrong in silence, looked for before it can."""

from __future__ import annotations

import copy
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
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.data.synthetic import SOURCE_NAME as SYNTHETIC
from trl_reasoning_distill.data.tokenization import is_supervised, supervised_positions, tokenize_example
from trl_reasoning_distill.doctor.facts import Finding, Level, Resources, StageFacts, UnknownModelError
from trl_reasoning_distill.teacher.sampling import parse_mapping
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary, map_vocabulary

_QUESTION, _REASONING, _ANSWER = "What is (2 + 3) * 4?", "First 2 + 3 = 5. Then 5 * 4 = 20.", "20"
_OVERLONG_WARNING, _OVERLONG_LIMIT = 0.01, 0.5


def check_template(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Do padding and template leave the reasoning and the end token alone?"""
    if not facts.is_training:
        return
    tokenizer = _student_tokenizer(facts, resources)
    if tokenizer.eos_token_id is None:
        yield Finding(
            "red", facts.name, "the student's tokenizer has no EOS token: the model could never learn to stop."
        )
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "green",
            facts.name,
            "padding is the EOS token; only padding is masked, the completion's own EOS is trained on.",
        )
    if tokenizer.chat_template is not None:
        form = ReasoningFormat.preset(str(facts.get("reasoning_format") or "think"))
        yield _judge_template(facts.name, tokenizer, form, _template_variables(facts))


def _judge_template(stage: str, tokenizer: Any, form: ReasoningFormat, options: dict[str, Any]) -> Finding:
    """What becomes of one chain of thought."""
    question = [{"role": "user", "content": _QUESTION}]
    row = {
        "prompt": question,
        "completion": [{"role": "assistant", "content": form.render(_REASONING, _ANSWER)}],
    }
    prompt = render_prompt(tokenizer, question, **options)
    if form.close_tag and prompt.rstrip().endswith(form.close_tag):
        return Finding(
            "red",
            stage,
            f"the chat template ends its prompt with a closed {form.open_tag}…{form.close_tag}: the student would be asked not to think. Set "
            'chat_template_kwargs to {"enable_thinking": true}, or give another chat_template_path.',
        )
    tokens = tokenize_example(tokenizer, row, chat_template_kwargs=options)
    supervised = [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if is_supervised(label)]
    before = tokenizer.decode(tokens.input_ids[: len(tokens.input_ids) - len(supervised)])
    text = tokenizer.decode(supervised)
    if form.open_tag and not form.parse(text, opened=form.is_opened_by(before)).well_formed:
        return Finding(
            "red",
            stage,
            f"the chat template drops or doubles {form.open_tag}: the student would be trained on {text[:80]!r}. Give another chat_template_path.",
        )
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in supervised:
        return Finding(
            "yellow",
            stage,
            f"the chat template ends the assistant's turn without {tokenizer.eos_token!r}: check that generation stops at what it ends with.",
        )
    return Finding("green", stage, "the chat template keeps the reasoning whole and ends with EOS.")


def check_rows(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Of the rows that exist: how many are too long, how many have nothing to learn from?"""
    if not facts.is_training or not facts.sample:
        return
    tokenizer, options = _student_tokenizer(facts, resources), _template_variables(facts)
    limit = facts.get("max_length")
    rows = [tokenize_example(tokenizer, row, chat_template_kwargs=options) for row in facts.sample]
    empty = sum(not supervised_positions(row.labels) for row in rows)
    if empty:
        yield Finding(
            "red" if empty == len(rows) else "yellow",
            facts.name,
            f"{empty} of the first {len(rows)} rows have no supervised token.",
        )
    overlong = sum(limit is not None and len(row.input_ids) > int(limit) for row in rows)
    share = overlong / len(rows)
    if share > _OVERLONG_WARNING:
        longest = max(len(row.input_ids) for row in rows)
        yield Finding(
            "red" if share > _OVERLONG_LIMIT else "yellow",
            facts.name,
            f"{overlong} of the first {len(rows)} rows are longer than max_length={limit} (the longest has {longest}) and would be left out.",
        )


def _student_tokenizer(facts: StageFacts, resources: Resources) -> Any:
    """The student's tokenizer, with the chat template that the options put in its place."""
    tokenizer, path = resources.tokenizer(facts.get("model_name_or_path")), facts.get("chat_template_path")
    if not path:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    is_file = Path(path).is_file()
    tokenizer.chat_template = Path(path).read_text("utf-8") if is_file else resources.tokenizer(path).chat_template
    return tokenizer


def _template_variables(facts: StageFacts) -> dict[str, Any]:
    options = facts.get("chat_template_kwargs") or {}
    return parse_mapping(options, "chat_template_kwargs") if isinstance(options, str) else dict(options)


_WHOLE_QUESTION = 10_000  # words
MOST_COMPARED = 5000
"""Problems of a source that are compared with those of the test."""

Check = Callable[[StageFacts, Resources], Iterator[Finding]]


def check_stage(facts: StageFacts, resources: Resources) -> list[Finding]:
    """Everything that can be said of one stage by itself."""
    found: list[Finding] = []
    for check in (check_models, check_extras, check_evaluation_rows, check_output, check_template, check_rows):
        try:
            found += check(facts, resources)
        except UnknownModelError:  # check_models has said so
            continue
    return found


def check_models(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Can configuration and tokenizer be had; is a hub model's own code asked for?"""
    for role, served in facts.served.items():
        yield Finding(
            "green", facts.name, f"{role} is {served.model} at {served.url}: no memory is needed for it here."
        )
        if not os.environ.get(served.key_variable):
            yield Finding(
                "yellow",
                facts.name,
                f"${served.key_variable} is not set: a hosted server refuses {role} without its key; one of your own may not ask for it.",
            )
    for role, model in facts.models.items():
        if not model:
            yield Finding("red", facts.name, f"no {role} is named.")
            continue
        if str(model).startswith("runs/"):
            continue  # made by an earlier stage
        try:
            resources.config(model)
            resources.tokenizer(model)
        except UnknownModelError as error:
            yield Finding(
                "yellow", facts.name, f"{role}: its configuration cannot be had here, so it is not checked ({error})."
            )
    if facts.get("trust_remote_code"):
        yield Finding(
            "yellow", facts.name, "trust_remote_code is on: code that comes with the model runs on this machine."
        )


def check_extras(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Is everything installed that the options ask for?"""
    needs: dict[str, str] = {}
    if (
        facts.get("load_in_4bit")
        or facts.get("load_in_8bit")
        or facts.get("quantization")
        or "8bit" in str(facts.get("optim"))
        or "paged" in str(facts.get("optim"))
    ):
        needs["bitsandbytes"] = "quantization"
    if facts.get("engine") == "vllm":
        needs["vllm"] = "vllm"
    if facts.served:
        needs["openai"] = "server"
    if facts.item.script == "report":
        needs |= {"matplotlib": "report", "jinja2": "report"}
    for module, extra in needs.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                "red", facts.name, f"{module} is not installed: pip install 'trl-reasoning-distill[{extra}]'."
            )


def check_evaluation_rows(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Does a training that evaluates have rows to evaluate?"""
    if not facts.is_training:
        return
    strategy = facts.get("eval_strategy")
    asks = str(getattr(strategy, "value", strategy)) not in ("no", "False", "None")
    if asks and not (facts.get("eval_path") or facts.get("eval_share") or facts.get("eval_dataset")):
        yield Finding(
            "red",
            facts.name,
            f"eval_strategy is {strategy}, but there are no evaluation rows: set eval_share or eval_path.",
        )
    if facts.get("load_best_model_at_end") and not asks:
        yield Finding("red", facts.name, "load_best_model_at_end needs eval_strategy: steps or epoch.")


def check_output(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Is the output folder free, or this recipe's own?"""
    folder = facts.item.output_dir
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        yield Finding(
            "yellow", facts.name, f"{folder} holds an unfinished run; it goes on there if the options are the same."
        )
        return
    yield Finding(
        "yellow",
        facts.name,
        f"{folder} holds a finished {manifest.stage} ({manifest.result}); it is used as it is, or refused if options changed (--overwrite).",
    )


def check_recipe(stages: Sequence[StageFacts], resources: Resources) -> list[Finding]:
    """What only shows between stages: do teacher and student agree, are training and test apart, is the control fair?"""
    found: list[Finding] = []
    for check in (check_vocabularies, check_contamination, check_control):
        try:
            found += check(stages, resources)
        except UnknownModelError as error:
            found.append(Finding("yellow", "recipe", f"{check.__doc__ or ''} Not checked: {error}."))
    return found


def check_vocabularies(stages: Sequence[StageFacts], resources: Resources) -> Iterator[Finding]:
    """Teacher's and student's vocabulary."""
    captures = [facts for facts in stages if facts.item.script == "capture"]
    aligned = any(facts.item.script == "align" for facts in stages)
    for student_stage in (facts for facts in stages if facts.item.script == "distill"):
        for capture in captures:
            teacher, student = capture.get("model"), student_stage.get("model_name_or_path")
            vocabularies = [Vocabulary(resources.tokenizer(name)) for name in (teacher, student)]
            mapped = map_vocabulary(vocabularies[0], vocabularies[1])
            same = all(int(twin) == i for i, twin in enumerate(mapped) if i in vocabularies[0].bytes_of)
            sizes = [resources.config(name).get_text_config().vocab_size for name in (teacher, student)]
            if same:
                note = (
                    ""
                    if sizes[0] == sizes[1]
                    else f" (embeddings of {sizes[0]:,} and {sizes[1]:,} rows: padding rows carry no mass)"
                )
                yield Finding("green", student_stage.name, f"teacher and student have one tokenizer{note}.")
            elif aligned:
                yield Finding(
                    "green",
                    student_stage.name,
                    "teacher and student have different tokenizers, and the recipe aligns them.",
                )
            else:
                share = float((mapped >= 0).mean())
                yield Finding(
                    "red",
                    student_stage.name,
                    f"teacher and student have different tokenizers ({share:.0%} of the teacher's tokens have a twin): add the stage align between capture and distill.",
                )


def check_contamination(stages: Sequence[StageFacts], resources: Resources) -> Iterator[Finding]:
    """Training and test problems: the same part of one source, or, where both are at hand, questions that share 13 words."""
    made = [facts for facts in stages if facts.item.script == "generate"]
    trained = made or [facts for facts in stages if facts.is_training and facts.rows_path][:1]
    for facts in (facts for facts in stages if facts.item.script == "evaluate"):
        name = f"{facts.get('source')}, split {facts.get('split')!r}"
        for source in trained:
            same = all(source.get(key) == facts.get(key) for key in ("source", "split"))
            shared = 0 if same else _count_shared(source, facts)
            if same:
                yield Finding("red", facts.name, f"tests on {name}: the very problems that are trained on.")
            elif shared:
                yield Finding(
                    "red",
                    facts.name,
                    f"{shared:,} problems of {source.name} stand in {name}, or share 13 words with it: leave them out with `data prepare`.",
                )
            elif shared == 0:
                yield Finding("green", facts.name, f"no problem of {source.name} stands in {name}.")


def _count_shared(trained: StageFacts, tested: StageFacts) -> int | None:
    """How many problems to train on stand among those of the test; `None` where one of the two is not on this machine."""
    problems, test = _local_problems(trained), _local_problems(tested)
    if problems is None or test is None:
        return None
    is_made_up = SYNTHETIC in (
        trained.get("source"),
        tested.get("source"),
    )  # its questions share their wording, not their numbers
    stands_in_test = Decontaminator({tested.name: test}, ngram=_WHOLE_QUESTION if is_made_up else NGRAM)
    return sum(stands_in_test(problem) is not None for problem in problems)


def _local_problems(facts: StageFacts) -> list[Problem] | None:
    """The problems that a stage asks, or the prompts that it trains on, if they are on this machine."""
    if facts.is_training:
        return [
            Problem(f"row {number}", prompt, None, facts.name) for number, prompt in enumerate(facts.prompts, start=1)
        ]
    source, data_dir = str(facts.get("source")), facts.get("data_dir")
    options = dict(facts.get("source_options") or {}) | ({"data_dir": data_dir} if data_dir else {})
    if not (Path(source).exists() or source == SYNTHETIC or options.get("data_dir")):
        return None
    limit = min(int(facts.get("limit") or MOST_COMPARED), MOST_COMPARED)
    try:
        seed = int(facts.get("problem_seed") or 0)
        return load_problems(source, split=facts.get("split"), limit=limit, seed=seed, **options)
    except (ValueError, FileNotFoundError):  # the stage itself will say why
        return None


def check_control(stages: Sequence[StageFacts], resources: Resources) -> Iterator[Finding]:
    """The SFT control's budget."""
    trainings = {facts.item.script: facts for facts in stages if facts.item.script in ("sft", "distill")}
    if set(trainings) != {"sft", "distill"}:
        return
    sft, distill = trainings["sft"], trainings["distill"]
    if str(distill.get("model_name_or_path")).startswith(str(sft.item.output_dir)):
        return  # distillation goes on from the SFT model: stages of one student, not arms of a comparison
    names = (
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "dataset_path",
        "seed",
    )
    differing = [name for name in names if sft.get(name) != distill.get(name)]
    if differing:
        yield Finding(
            "yellow",
            distill.name,
            f"the SFT control differs in {', '.join(differing)}: a difference in accuracy would not be distillation's alone.",
        )
    else:
        yield Finding("green", distill.name, "the SFT control has the same rows, steps and batch.")


def check_disk(folder: Path, needed: int) -> Finding:
    """Is there room for what the recipe writes?"""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    level: Level = "red" if needed > free else "yellow" if needed > 0.8 * free else "green"
    return Finding(
        level,
        "recipe",
        f"about {needed / 2**30:.1f} GiB of disk are needed, {free / 2**30:.1f} GiB are free at {folder}.",
    )
