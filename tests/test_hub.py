"""Whatever is wrong with a name, a folder or a file is one line that says what was asked for and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from trl_reasoning_distill.hub import context_length, find_config, load_config, load_processor, load_tokenizer


@pytest.fixture
def student(quickstart_models: Path) -> str:
    return str(quickstart_models / "student")


def test_a_tokenizer_takes_the_template_of_a_file_or_of_another_model(student: str, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    assert load_tokenizer(student, chat_template=str(template)).chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(student, chat_template=student).chat_template == load_tokenizer(student).chat_template


@pytest.mark.parametrize("load", [load_tokenizer, load_processor, load_config])
def test_a_name_that_leads_nowhere(load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^No [a-z ]+ could be loaded from '.*nosuch': \S") as raised:
        load(str(tmp_path / "nosuch"))
    assert "\n" not in str(raised.value)


def test_a_torn_tokenizer_file(student: str, tmp_path: Path) -> None:
    for file in Path(student).glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"No tokenizer could be loaded .* Copy it again\.$"):
        load_tokenizer(str(tmp_path), advice="Copy it again.")


def test_a_text_model_whose_tokenizer_names_the_processor_of_a_model_that_sees(student: str, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["processor_class"] = "Gemma3Processor"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises((OSError, ValueError, TypeError)):
        AutoProcessor.from_pretrained(tmp_path)  # else this shows nothing
    assert load_processor(str(tmp_path)).get_vocab() == load_tokenizer(student).get_vocab()


def test_a_template_that_is_not_there(student: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No chat template could be loaded from '.*none\.jinja'"):
        load_tokenizer(student, chat_template=str(tmp_path / "none.jinja"))


def test_a_folder_without_a_configuration_has_none(student: str, tmp_path: Path) -> None:
    assert find_config(str(tmp_path)) is None
    assert context_length(None) is None
    expected = json.loads((Path(student) / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    assert context_length(find_config(student)) == expected
