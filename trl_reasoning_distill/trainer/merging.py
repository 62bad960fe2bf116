"""An adapter merged into its base: one model, as exact as the base is stored."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_reasoning_distill.hub import load_tokenizer
from trl_reasoning_distill.trainer.trl_bridge import loading_whole


@loading_whole()
def merge_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Write base plus adapter as one model with its tokenizer; the folder appears when it is whole.

    The base is loaded as it is stored, not as it was trained on: an adapter that was trained on 4 bits is merged into full
    precision. Works on the CPU, from files alone, so it does not matter on how many ranks the adapter was trained.

    Args:
        adapter: Folder of the adapter, which names its base.
        output: Folder to write.
        dtype: Of the weights: float32, bfloat16, float16, or `"auto"` for the checkpoint's own. A lower one than the training's
            rounds what the adapter added.
        trust_remote_code: Run code that comes with the base.

    Raises:
        ValueError: If the base is stored quantised: there is no full precision to merge into.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    base: Any = AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path,
        revision=config.revision,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
    )
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base {config.base_model_name_or_path} is stored quantised, so nothing can be merged into it; name the full-precision model "
            "in the adapter's adapter_config.json."
        )
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    untie_if_parted(merged)
    partial = Path(output).with_name(f".{Path(output).name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    load_tokenizer(str(adapter), trust_remote_code=trust_remote_code).save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def untie_if_parted(model: PreTrainedModel) -> None:
    """Say in the config that embedding and head are two layers, where training them apart has made them so.

    Else the next load would tie them again and lose one.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config()
    if head is None or not config.tie_word_embeddings or head.weight is embedding.weight:
        return
    if torch.equal(head.weight, embedding.weight):  # type: ignore[arg-type]
        head.weight = embedding.weight
        return
    config.tie_word_embeddings = model.config.tie_word_embeddings = False
