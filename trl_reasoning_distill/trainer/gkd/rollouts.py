"""Rollouts: completions sampled during training, from the student or with `seq_kd` from the teacher.

Each completion is drawn with random numbers of its own, given by the seed, the step and the prompt. So it is the same on any number of
ranks, in any batch and after a resumption, as far as the arithmetic is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, is_supervised
from trl_reasoning_distill.teacher.sampling.base import SamplingConfig
from trl_reasoning_distill.teacher.sampling.transformers import SeededSampler, eos_token_ids, generation_mode
from trl_reasoning_distill.trainer.gkd.live_teacher import vocabulary_rows
from trl_reasoning_distill.trainer.gkd.rows import unpad
from trl_reasoning_distill.trainer.preparation import LOSS_WEIGHT
from trl_reasoning_distill.trainer.trl_bridge import is_zero3, make_vllm

GenerateFunction = Callable[[Any, dict[str, Tensor], GenerationConfig], tuple[Tensor, Tensor, Tensor]]
"""`generate_on_policy_outputs` of TRL's GKDTrainer: ids, mask and labels from a model and left-padded prompts."""


@dataclass(frozen=True)
class Completion:
    """What was written after one prompt.

    Attributes:
        ids: Token ids, the end token included.
        is_truncated: Whether it was cut before it ended.
    """

    ids: list[int]
    is_truncated: bool

    def cut(self, length: int) -> Completion:
        """At most so many tokens of it."""
        return self if len(self.ids) <= length else Completion(self.ids[: max(0, length)], True)


@dataclass
class Tally:
    """What was written since the last log, on this rank: sums, so that ranks can be added up.

    Attributes:
        batches: Micro-batches, written or not.
        written: Those that the student wrote.
        completions: Completions written, by whichever model.
        truncated: Of them, cut before their end.
        dropped: Of them, left out of the loss.
        tokens: Tokens in them.
        seconds: Spent writing.
    """

    batches: float = 0.0
    written: float = 0.0
    completions: float = 0.0
    truncated: float = 0.0
    dropped: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def count(self, written: Sequence[Completion], rows: Sequence[dict[str, Any]], by_student: bool) -> None:
        """Count a micro-batch of completions and the rows that were made of them."""
        self.written += by_student
        self.completions += len(written)
        self.truncated += sum(completion.is_truncated for completion in written)
        self.dropped += sum(not any(map(is_supervised, row["labels"])) for row in rows)
        self.tokens += sum(len(completion.ids) for completion in written)

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """What is logged of all ranks. A collective: every rank calls it."""
        names = list(vars(self))
        local = torch.tensor([getattr(self, name) for name in names], dtype=torch.float64, device=accelerator.device)
        total = dict(zip(names, accelerator.reduce(local, "sum").tolist(), strict=True))
        metrics = {"on_policy_share": total["written"] / max(total["batches"], 1.0)}
        if total["completions"]:
            count = total["completions"]
            metrics |= {
                "completion_length": total["tokens"] / count,
                "truncated_share": total["truncated"] / count,
                "dropped_share": total["dropped"] / count,
                # Ranks write at the same time, each for `seconds` of its own
                "generated_tokens_per_second": total["tokens"]
                / max(total["seconds"] / accelerator.num_processes, 1e-9),
            }
        return metrics


@dataclass(frozen=True)
class Writer:
    """Writes completions with `transformers`, through the trainer's `generate_on_policy_outputs`.

    Attributes:
        accelerator: Says whether ranks must step together.
        generate: The trainer's function.
        tokenizer: The student's.
        generation: The trainer's `generation_config`, looked up at each call.
        shared_ids: Ids from here on are never written: the teacher does not know them, or they pad the embedding.
        seed: Of the run.
    """

    accelerator: Accelerator
    generate: GenerateFunction
    tokenizer: Any
    generation: Callable[[], GenerationConfig]
    shared_ids: int
    seed: int

    def write(self, model: Any, prompts: Tensor, mask: Tensor, limits: Sequence[int], step: int) -> list[Completion]:
        """Completions of left-padded prompts `(batch, length)`, each of at most so many tokens as its limit."""
        config = copy.deepcopy(self.generation())
        config.max_new_tokens = max(1, min(config.max_new_tokens, max(limits)))
        options: dict[str, Any] = {"synced_gpus": self._is_sharded and self.accelerator.num_processes > 1}
        if config.do_sample:
            sampling = SamplingConfig(config.max_new_tokens, config.temperature, config.top_p or 1.0, config.top_k or 0)
            seeds = [self._seed(ids, step) for ids in unpad(prompts, mask)]
            options["logits_processor"] = LogitsProcessorList([SeededSampler(seeds, sampling, prompts.shape[1])])
        # The sampler draws first and leaves one token possible
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = list(dict.fromkeys([*ends, *eos_token_ids(model, self.tokenizer)]))
        config.eos_token_id = [end for end in ends if end is not None]
        foreign = range(self.shared_ids, vocabulary_rows(model.config))
        config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *foreign}) or None
        inputs = {"prompts": prompts, "prompt_attention_mask": mask}
        with generation_mode(model), _generating_with(model, **options):
            ids, _, labels = self.generate(model, inputs, config)
        written = [row[is_supervised(label)].tolist() for row, label in zip(ids, labels, strict=True)]
        return [as_completion(row, set(ends), limit) for row, limit in zip(written, limits, strict=True)]

    def _seed(self, prompt: Sequence[int], step: int) -> int:
        return xxhash.xxh3_64_intdigest(f"{step} {list(prompt)}".encode(), seed=self.seed % 2**64)

    @property
    def _is_sharded(self) -> bool:
        """Whether a forward gathers weights from other ranks, which must then take it too."""
        return is_zero3(self.accelerator) or self.accelerator.distributed_type == DistributedType.FSDP


@contextlib.contextmanager
def _generating_with(model: Any, **options: Any) -> Iterator[None]:
    """Let `model.generate` have these options beside those of its caller."""
    own = vars(model).get("generate")
    model.generate = functools.partial(model.generate, **options)
    try:
        yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own


@dataclass
class VLLMWriter:
    """Writes completions with vLLM, through TRL's `VLLMGeneration`.

    Attributes:
        vllm: TRL's.
        tokenizer: The student's.
        shared_ids: A completion is cut before an id from here on.
        synced_step: The step that vLLM's weights are of.
    """

    vllm: Any
    tokenizer: Any
    shared_ids: int
    synced_step: int = field(default=-1)

    def write(self, model: Any, prompts: Tensor, mask: Tensor, limits: Sequence[int], step: int) -> list[Completion]:
        """See `Writer.write`; of `model` only the end tokens are used."""
        if step != self.synced_step:
            self.vllm.sync_weights()
            self.synced_step = step
        rows = unpad(prompts, mask)
        _, written, *_ = self.vllm.generate(rows, None, 1)
        ends = set(eos_token_ids(model, self.tokenizer))
        completions = []
        for ids, limit in zip(written, limits, strict=True):
            foreign = next((place for place, token in enumerate(ids) if token >= self.shared_ids), len(ids))
            completions.append(as_completion(list(ids)[:foreign], ends, limit))
        return completions


def written_row(prompt: list[int], completion: Completion, by_student: bool, drops_truncated: bool) -> dict[str, Any]:
    """A row of a prompt and what was written after it. The student is not fine-tuned on its own text, so that has no weight there."""
    ids = [*prompt, *completion.ids]
    is_dropped = completion.is_truncated and drops_truncated
    supervised = [IGNORE_INDEX] * len(completion.ids) if is_dropped else completion.ids
    weights = [0.0 if by_student else 1.0] * len(ids)
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + supervised, LOSS_WEIGHT: weights}


def sample(tokenizer: Any, prompt: list[int], completion: Completion, step: int, by_student: bool) -> dict[str, Any]:
    """A completion as text, for people to read."""
    return {
        "step": step,
        "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
        "completion": tokenizer.decode(completion.ids),
        "truncated": completion.is_truncated,
        "written_by": "student" if by_student else "teacher",
    }


def as_completion(ids: list[int], ends: set[int], limit: int) -> Completion:
    """Ids up to the first end token, at most `limit` of them."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return Completion(ids if end is None else ids[: end + 1], end is None).cut(limit)


@contextlib.contextmanager
def timed(tally: Tally) -> Iterator[None]:
    """Count the seconds of a block."""
    started = time.perf_counter()
    try:
        yield
    finally:
        tally.seconds += time.perf_counter() - started


def make_writer(trainer: Any) -> Writer | VLLMWriter:
    """What a GKD trainer's student writes with: `transformers`, or vLLM where that is asked for.

    Raises:
        ValueError: If vLLM is asked for and not installed.
    """
    args, tokenizer = trainer.args, trainer.tokenizer
    if not args.use_vllm:
        return transformers_writer(trainer)
    try:
        vllm = make_vllm(
            trainer.model,
            trainer.accelerator,
            tokenizer,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            max_model_length=args.max_length,
            temperature=trainer.temperature,
            max_completion_length=trainer.generation_config.max_new_tokens,
        )
    except ImportError as error:
        raise ValueError(f"`use_vllm`: {error} Or leave use_vllm out: transformers writes then.") from None
    return VLLMWriter(vllm, tokenizer, trainer.shared_ids)


def transformers_writer(trainer: Any) -> Writer:
    """A `Writer` with the trainer's settings."""
    return Writer(
        trainer.accelerator,
        trainer.generate_on_policy_outputs,
        trainer.tokenizer,
        lambda: trainer.generation_config,
        shared_ids=trainer.shared_ids,
        seed=trainer.args.seed,
    )
