"""Options of `TopKGKDTrainer`: those of TRL's `GKDConfig` and of `ReasoningSFTConfig`, and its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trl_reasoning_distill.options import Count, NonNegative, Positive, PositiveShare, Share, check_options, option
from trl_reasoning_distill.teacher.context import TeacherContextOptions
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, formerly
from trl_reasoning_distill.trainer.gkd.base import GKDConfig


@formerly(top_k="kd_top_k", teacher_tokenizer_name_or_path="teacher_tokenizer")
@dataclass
class TopKGKDConfig(TeacherContextOptions, ReasoningSFTConfig, GKDConfig):
    """Configuration of `TopKGKDTrainer`: every field of TRL's `GKDConfig` and of `ReasoningSFTConfig`, the teacher's context, and those below.

    The first eight are `GKDConfig`'s, with its defaults.

    Raises:
        ValueError: If a field holds a value that it cannot, or a combination that has no meaning.
    """

    _VALID_DICT_FIELDS = [*ReasoningSFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    temperature: NonNegative = option(
        0.9, "Temperature that completions are sampled at; 0 for greedy. The loss has `kd_temperature`."
    )
    lmbda: Share = option(0.5, "Share of the micro-batches whose completions the student writes itself.")
    beta: Share = option(
        0.5,
        "0 for KL(teacher || student), 1 for KL(student || teacher), in between the generalised Jensen-Shannon divergence.",
    )
    max_new_tokens: Count = option(128, "Most tokens of a completion that is written.")
    teacher_model_name_or_path: str | None = option(
        None,
        "The teacher: folder or hub name of a model. Without one the teacher is the student as it was before training: its base with the "
        "adapter off, or a frozen copy.",
        aliases=["teacher"],
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for from_pretrained, as JSON, when the teacher is loaded by its name."
    )
    disable_dropout: bool = option(True, "Switch the student's dropout off.")
    seq_kd: bool = option(False, "Let the teacher write the completions that the student does not write.")
    kd_top_k: Count | None = option(
        50,
        "Ids per position that the divergence tells apart: the teacher's most likely, or with beta=1 the student's. The rest of the "
        "vocabulary is one more event, with its exact mass. null compares the whole vocabulary.",
    )
    kd_temperature: Positive = option(1.0, "Temperature of both distributions in the divergence.")
    kd_weight: NonNegative = option(1.0, "Weight of the divergence.")
    kd_scale_by_t2: bool = option(True, "Multiply the divergence by the squared kd_temperature.")
    sft_weight: NonNegative = option(
        0.0,
        "Weight of the cross-entropy on completions that the student did not write: the dataset's, or with seq_kd the teacher's.",
    )
    truncated_rollouts: Literal["keep", "drop"] = option(
        "keep",
        "Completions cut at max_new_tokens or max_length before their end: keep what there is of them in the loss, or drop them. Both "
        "are counted.",
    )
    teacher_server_url: str | None = option(
        None,
        "Base URL of an OpenAI-compatible server with prompt log-probabilities that serves teacher_model_name_or_path: the teacher is "
        "scored there and not loaded.",
    )
    teacher_tokenizer: str | None = option(None, "Tokenizer of the teacher, where it is not saved with the model.")
    teacher_quantization: Literal["4bit", "8bit"] | None = option(
        None, "Load the teacher in 4bit (NF4) or 8bit through bitsandbytes."
    )
    ds3_gather_for_generation: bool = option(
        True, "Gather all weights on each rank for generation under ZeRO-3: faster, while one rank can hold them."
    )
    use_vllm: bool = option(False, "Generate with vLLM, as TRL's own online trainers do.")
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate", "vLLM in the training processes, or as a server (`trl vllm-serve`)."
    )
    vllm_server_base_url: str | None = option(None, "Where vLLM's server is.")
    vllm_gpu_memory_utilization: PositiveShare = option(0.3, "Share of the GPU's memory for a colocated vLLM.")
    vllm_tensor_parallel_size: Count = option(1, "GPUs that one colocated vLLM spreads over.")
    log_completions: bool = option(
        False, "Print a table of completions at every log, and send it to wandb or trackio where they report."
    )
    num_completions_to_print: Count = option(4, "Rows of that table.")
    refresh_store: str | None = option(
        None,
        "Folder for a Top-K store of the student's completions and the teacher's log-probabilities, for offline runs later.",
    )
    refresh_top_k: Count = option(25, "Places per record of that store.")

    @property
    def needs_reply(self) -> bool:
        """Whether a row of the training set must bring its completion; a model may write all of them."""
        return not (self.lmbda == 1.0 or self.seq_kd)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context()
        check_options(self)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        refused = {
            "`packing` and `padding_free`: completions are written anew at each step, so rows are laid out there.": (
                self.packing or self.padding_free
            ),
            "`dataset_kwargs` with skip_prepare_dataset: the prompts to write from are found in preparation. Leave it out.": bool(
                isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset")
            ),
            "`truncation_mode='keep_end'`: a row without its beginning has no prompt to write from. Leave it out.": (
                self.truncation_mode == "keep_end"
            ),
            "`assistant_only_loss`: here the last reply is what is learnt. Give it as `completion`, or last in `messages`.": (
                self.assistant_only_loss
            ),
            f"`sft_weight={self.sft_weight:g}` with `lmbda=1`: the student writes every completion, so there is none to fine-tune on. "
            "Lower lmbda.": self.sft_weight > 0 and self.lmbda == 1.0,
            "`teacher_server_url` without `teacher_model_name_or_path`: give the name that the server knows the teacher by.": (
                self.teacher_server_url is not None and self.teacher_model_name_or_path is None
            ),
            "`kd_top_k=None` with `teacher_server_url`: a server gives its most likely tokens only. Set kd_top_k to at most what it gives "
            "(20 with vLLM's default).": self.teacher_server_url is not None and self.kd_top_k is None,
            f"`kd_temperature={self.kd_temperature:g}` with `teacher_server_url`: a server does not give the log-sum-exp at another "
            "temperature, so the tail would be a guess. Use 1.": self.teacher_server_url is not None
            and self.kd_temperature != 1.0,
            "`seq_kd` with `teacher_server_url`: let the `generate` stage write the teacher's completions with `engine: openai`.": (
                self.seq_kd and self.teacher_server_url is not None
            ),
            "`reference_logits`: a completion that is written during training is in no store. Leave it out: the reference is then the adapter "
            "switched off, or a frozen copy.": self.reference_logits is not None and (self.lmbda > 0 or self.seq_kd),
            "`refresh_store` with `lmbda=0`: the student writes nothing that could be stored.": (
                self.refresh_store is not None and self.lmbda == 0.0
            ),
        }
        for reason, is_refused in refused.items():
            if is_refused:
                raise ValueError(reason)

    @property
    def has_segment_weights(self) -> bool:
        """See `ReasoningSFTConfig.has_segment_weights`; the student's own text has the weight 0."""
        return self.sft_weight > 0 or super().has_segment_weights

    @property
    def loads_teacher(self) -> bool:
        """Whether these options name a teacher to load."""
        return self.teacher_model_name_or_path is not None and self.teacher_server_url is None
