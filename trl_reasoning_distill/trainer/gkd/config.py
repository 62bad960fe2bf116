"""What `TopKGKDTrainer` can be told: the fields of TRL's `GKDConfig` and of `ReasoningSFTConfig`, and those below."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl_reasoning_distill.options import option
from trl_reasoning_distill.teacher.context import TeacherContextOptions
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, check_bool, check_choice, check_number
from trl_reasoning_distill.trainer.trl_bridge import GKDConfig


@dataclass
class TopKGKDConfig(TeacherContextOptions, ReasoningSFTConfig, GKDConfig):
    """Configuration of `TopKGKDTrainer`: TRL's `GKDConfig`, `ReasoningSFTConfig`, the teacher's context, and those below.

    Of `GKDConfig`, as its paper has them: `lmbda` is the share of micro-batches that the student writes itself; `seq_kd` lets the teacher
    write the others; `beta` is 0 for KL(teacher ‖ student), 1 for KL(student ‖ teacher), and the generalised Jensen–Shannon divergence
    in between; `temperature` is that of sampling, 0 for greedy. `teacher_model_name_or_path=None` is the model itself as it was before
    training: its base with the adapter off, or a frozen copy.

    Args:
        kd_top_k: How many ids per position the divergence tells apart: the teacher's most likely, or with `beta=1` the student's. The
            rest of the vocabulary is one more event, with its exact mass. `None` compares the whole vocabulary.
        kd_temperature: Temperature of both distributions in the divergence.
        kd_weight: Weight of the divergence.
        kd_scale_by_t2: Multiply the divergence by the squared `kd_temperature`.
        sft_weight: Weight of the negative log-likelihood of completions that the student did not write: the dataset's, or with
            `seq_kd` the teacher's.
        truncated_rollouts: Completions that were cut at `max_new_tokens` or `max_length` before their end: `"keep"` what there is of
            them, or `"drop"` them from the loss. Both are counted.
        teacher_server_url: Base URL of an OpenAI-compatible server with prompt log-probabilities that knows
            `teacher_model_name_or_path`. The teacher is asked there and not loaded.
        teacher_tokenizer: Tokenizer of the teacher, where it does not lie with the model.
        teacher_quantization: `"4bit"` (NF4) or `"8bit"`, through bitsandbytes.
        ds3_gather_for_generation: Gather all weights on each rank for generation under ZeRO-3: faster, while one rank can hold them.
        use_vllm: Generate with vLLM, as TRL's own online trainers do.
        vllm_mode: `"colocate"` in the training processes, or `"server"` (`trl vllm-serve`).
        vllm_server_base_url: Where that server is.
        vllm_gpu_memory_utilization: Share of the GPU's memory for a colocated vLLM.
        vllm_tensor_parallel_size: GPUs that one colocated vLLM spreads over.
        log_completions: Print a table of what the student wrote, at every log, and send it to wandb or trackio where they report.
        num_completions_to_print: Rows of that table.
        refresh_store: Folder for a Top-K store of what the student wrote and the teacher said of it, for offline runs to come.
        refresh_top_k: Places per record of that store.

    Raises:
        ValueError: If a field holds a value that it cannot, or a combination that has no meaning.
    """

    _VALID_DICT_FIELDS = [*ReasoningSFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    teacher_model_name_or_path: str | None = option(
        None,
        "The teacher: folder or hub name of a model. Default: the student as it was before training.",
        aliases=["teacher"],
    )
    kd_top_k: int | None = field(
        default=50,
        metadata={"help": "Ids per position that the divergence tells apart; null for the whole vocabulary."},
    )
    kd_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the divergence (temperature samples)."}
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    kd_scale_by_t2: bool = field(default=True, metadata={"help": "Multiply the divergence by the squared temperature."})
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the cross-entropy on completions that the student did not write itself."},
    )
    truncated_rollouts: str = field(
        default="keep",
        metadata={
            "help": "Completions cut before their end: 'keep' them in the loss, or 'drop' them.",
            "choices": ["keep", "drop"],
        },
    )
    teacher_server_url: str | None = field(
        default=None,
        metadata={"help": "Ask an OpenAI-compatible server for the teacher's log-probabilities instead of loading it."},
    )
    teacher_tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of the teacher, where it does not lie with the model."}
    )
    teacher_quantization: str | None = field(
        default=None, metadata={"help": "Load the teacher in 4bit (NF4) or 8bit through bitsandbytes."}
    )
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Gather all weights on each rank for generation under ZeRO-3."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM."})
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "vLLM in the training processes or as a server.", "choices": ["colocate", "server"]},
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Where vLLM's server is."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for a colocated vLLM."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that one colocated vLLM spreads over."})
    log_completions: bool = field(
        default=False, metadata={"help": "Print a table of what the student wrote at every log."}
    )
    num_completions_to_print: int = field(default=4, metadata={"help": "Rows of that table."})
    refresh_store: str | None = field(
        default=None,
        metadata={"help": "Folder for a Top-K store of the student's texts and the teacher's log-probabilities."},
    )
    refresh_top_k: int = field(default=25, metadata={"help": "Places per record of that store."})

    @property
    def needs_reply(self) -> bool:
        """Whether a row of the training set must bring its completion; a model may write all of them."""
        return not (self.lmbda == 1.0 or self.seq_kd)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context()
        if self.kd_top_k is not None:
            check_number("kd_top_k", self.kd_top_k, minimum=1, kind=int)
        check_number("temperature", self.temperature, minimum=0.0)
        check_number("kd_temperature", self.kd_temperature, above=0.0)
        for name in ("kd_weight", "sft_weight"):
            check_number(name, getattr(self, name), minimum=0.0)
        for name in ("max_new_tokens", "num_completions_to_print", "refresh_top_k", "vllm_tensor_parallel_size"):
            check_number(name, getattr(self, name), minimum=1, kind=int)
        check_number("vllm_gpu_memory_utilization", self.vllm_gpu_memory_utilization, above=0.0, maximum=1.0)
        for name in ("lmbda", "beta"):
            check_number(name, getattr(self, name), minimum=0.0, maximum=1.0)
        check_choice("truncated_rollouts", self.truncated_rollouts, ("keep", "drop"))
        if self.teacher_quantization is not None:
            check_choice("teacher_quantization", self.teacher_quantization, ("4bit", "8bit"))
        check_choice("vllm_mode", self.vllm_mode, ("colocate", "server"))
        for name in ("kd_scale_by_t2", "seq_kd", "use_vllm", "log_completions", "ds3_gather_for_generation"):
            check_bool(name, getattr(self, name))
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        refused = {
            "`packing` and `padding_free`: completions are written anew at each step, so rows are laid out there.": (
                self.packing or self.padding_free
            ),
            "`dataset_kwargs` with skip_prepare_dataset: the prompts to write from are found in preparation. Leave it out.": bool(
                isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset")
            ),
            "`assistant_only_loss`: here the last reply is what is learnt. Give it as `completion`, or last in `messages`.": (
                self.assistant_only_loss
            ),
            f"`sft_weight={self.sft_weight:g}` with `lmbda=1`: the student writes every completion, so there is none to fine-tune on. "
            "Lower lmbda.": self.sft_weight > 0 and self.lmbda == 1.0,
            "`teacher_server_url` without `teacher_model_name_or_path`: give the name that the server knows the teacher by.": (
                self.teacher_server_url is not None and self.teacher_model_name_or_path is None
            ),
            "`kd_top_k=None` with `teacher_server_url`: a server tells its most likely tokens only. Set kd_top_k to at most what it gives "
            "(20 with vLLM's default).": self.teacher_server_url is not None and self.kd_top_k is None,
            f"`kd_temperature={self.kd_temperature:g}` with `teacher_server_url`: a server does not tell the log-sum-exp at another "
            "temperature, so the tail would be a guess. Use 1.": self.teacher_server_url is not None
            and self.kd_temperature != 1.0,
            "`seq_kd` with `teacher_server_url`: let the `generate` stage write the teacher's completions with `engine: openai`.": (
                self.seq_kd and self.teacher_server_url is not None
            ),
            "`reference_logits`: a text that a model writes now is in no store. Leave it out: the reference is then the adapter switched off, "
            "or a frozen copy.": self.reference_logits is not None and (self.lmbda > 0 or self.seq_kd),
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
    def divergence(self) -> dict[str, Any]:
        """The divergence as `fused_linear_distillation_loss` takes it."""
        name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd")
        return {"divergence": name, "beta": self.beta, "scale_by_t2": self.kd_scale_by_t2}
