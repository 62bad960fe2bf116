"""Capture: what the teacher says, to the stored precision, whatever the batches, the kills and the number of processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.teacher.tiny import make_model, make_tokenizer
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.teacher import head as head_module
from trl_reasoning_distill.teacher.audit import audit_store
from trl_reasoning_distill.teacher.capture import CaptureConfig, capture
from trl_reasoning_distill.teacher.context import TeacherContextOptions, with_teacher_prompts
from trl_reasoning_distill.teacher.head import LanguageModelHead
from trl_reasoning_distill.teacher.scoring import TransformersReader
from trl_reasoning_distill.teacher.store import StoreError, TopKStore

CONFIG = CaptureConfig(top_k=8, temperatures=(1.0, 2.0), unit_rows=3)


def make_rows(n: int = 11) -> list[dict[str, str]]:
    return [
        {"prompt": f"{i} and {i}: ", "completion": f"it is {2 * i}." + "!" * (i % 5), "answer": str(2 * i)}
        for i in range(n)
    ]


class TinyTeacher:
    """Makes the reader, counts the rows it reads, and may die at a given unit."""

    def __init__(
        self,
        config: CaptureConfig = CONFIG,
        *,
        dies_at_unit: int | None = None,
        max_batch_tokens: int = 64,
        provenance: dict[str, str] | None = None,
    ) -> None:
        self.config, self.dies_at_unit, self.max_batch_tokens = config, dies_at_unit, max_batch_tokens
        self.units, self.provenance_of_unit = 0, provenance or {}

    def __call__(self) -> TinyTeacher:
        self.reader = TransformersReader(
            make_model(),
            make_tokenizer(),
            self.config.top_k,
            self.config.temperatures,
            max_batch_tokens=self.max_batch_tokens,
        )
        self.context_length, self.provenance = self.reader.context_length, self.provenance_of_unit
        return self

    def read(self, rows, positions):
        if self.units == self.dies_at_unit:
            raise KeyboardInterrupt
        self.units += 1
        return self.reader.read(rows, positions)


def run(path: Path, teacher=None, rows=None, config: CaptureConfig = CONFIG, state=None, **fingerprint):
    teacher = teacher or TinyTeacher(config)
    rows = make_rows() if rows is None else rows
    return capture(
        teacher,
        make_tokenizer(),
        rows,
        path / "store",
        config,
        fingerprint={"teacher": "tiny", **fingerprint},
        state=state,
    )


def dense_log_probs(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("encoding", ["compact", "lossless"])
def test_store_holds_the_dense_distribution(tmp_path, encoding):
    """Every supervised position against the plain model, row by row; padding ids (259 and up) are in the tail only."""
    config = CaptureConfig(top_k=8, temperatures=(1.0, 2.0), unit_rows=4, encoding=encoding)
    store = run(tmp_path, config=config).store
    model = make_model()
    assert store.rows == 11
    for row, example in zip(store, make_rows(), strict=True):
        expected = tokenize_example(make_tokenizer(), example)
        assert row.input_ids.tolist() == expected.input_ids
        assert row.labels.tolist() == expected.labels
        logits = dense_log_probs(model, expected.input_ids)
        supervised = [t for t, label in enumerate(expected.labels) if label != -100]
        assert row.kd_index[supervised].tolist() == list(range(row.offset, row.offset + row.count))
        records = store.read(row.kd_index[supervised])
        for place, t in enumerate(supervised):
            known = logits[t - 1].clone()
            known[259:] = -torch.inf
            assert records.ids[place].tolist() == known.topk(8).indices.tolist()
            for temperature in (1.0, 2.0):
                dense = (logits[t - 1] / temperature).log_softmax(-1)[records.ids[place].tolist()].numpy()
                atol = 1e-5 if encoding == "lossless" else 0.07
                np.testing.assert_allclose(records.at_temperature(temperature)[place], dense, atol=atol, rtol=0)


def test_real_model_to_stored_precision(tmp_path, shared_data):
    """stories260K, pretrained: divergence and ids against its own dense log-softmax."""
    path = shared_data / "models" / "stories260K"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    rows = [
        {"prompt": "Once upon a time", "completion": f" there was a cat who had {n} red balls. She was happy."}
        for n in range(4)
    ]
    config = CaptureConfig(top_k=25)
    store = capture(
        lambda: TransformersReader(model, tokenizer, 25, config.temperatures),
        tokenizer,
        rows,
        tmp_path / "store",
        config,
        fingerprint={},
    ).store
    row = store.row(2)
    log_p = dense_log_probs(model, row.input_ids.tolist()).log_softmax(-1)[np.flatnonzero(row.kd_index >= 0) - 1]
    stored = store.read(np.arange(row.offset, row.offset + row.count))
    ids = torch.from_numpy(stored.ids).long()
    assert (ids == log_p.topk(25).indices).float().mean() > 0.999
    kept, stored_log_p = log_p.gather(1, ids), torch.from_numpy(stored.log_probs).double()
    rest = [torch.log1p(-x.exp().sum(1)) for x in (kept, stored_log_p)]
    kl = (kept.exp() * (kept - stored_log_p)).sum(1) + rest[0].exp() * (rest[0] - rest[1])
    assert kl.mean() < 1e-5


def test_batches_do_not_change_what_is_read(tmp_path):
    for name, tokens in (("one", 1), ("many", 100_000)):
        run(tmp_path / name, TinyTeacher(max_batch_tokens=tokens))
    one, many = (TopKStore.open(tmp_path / name / "store") for name in ("one", "many"))
    everything = np.arange(len(one))
    np.testing.assert_allclose(one.read(everything).log_probs, many.read(everything).log_probs, atol=0.07)
    assert (one.read(everything).ids == many.read(everything).ids).mean() > 0.99


@pytest.mark.parametrize("unit", [0, 1, 3])
def test_killed_run_goes_on_and_makes_the_same_bytes(tmp_path, unit):
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", TinyTeacher(dies_at_unit=unit))
    assert not (tmp_path / "killed" / "store" / "manifest.json").exists()
    if unit == 3:  # the kill also tore a file of a finished unit
        torn = tmp_path / "killed" / "parts" / "000001" / "rows.parquet"
        torn.write_bytes(torn.read_bytes()[:-7])
    resumed = TinyTeacher()
    run(tmp_path / "killed", resumed)
    assert resumed.units == {0: 4, 1: 3, 3: 2}[unit]
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    again = TinyTeacher()
    run(tmp_path / "killed", again)
    assert again.units == 0


def test_other_numbers_of_ranks_go_on_to_the_same_bytes(tmp_path):
    """One process dies after a unit, then the second of two after another; one finishes. (Two at once: `tests/distributed`.)"""
    run(tmp_path / "whole")
    for world in (1, 2):
        rank = SimpleNamespace(process_index=world - 1, num_processes=world, wait_for_everyone=lambda: None)
        with pytest.raises((KeyboardInterrupt, StoreError)):  # the second rank's share ends before it would die
            run(tmp_path / "killed", TinyTeacher(dies_at_unit=1), state=rank)
    done = sorted(path.name for path in (tmp_path / "killed" / "parts").iterdir())
    assert done == ["000000", "000002"]
    last = TinyTeacher()
    run(tmp_path / "killed", last)
    assert last.units == 2
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_another_capture_is_not_continued(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, TinyTeacher(dies_at_unit=2), dtype="float32")
    with pytest.raises(StoreError, match=r"dtype is 'float32' in the store, 'bfloat16' here"):
        run(tmp_path, dtype="bfloat16")
    with pytest.raises(StoreError, match="dataset is"):
        run(tmp_path, rows=make_rows(12), dtype="float32")


def test_units_of_different_readers_are_not_joined(tmp_path):
    """A server that was started anew in 16 bits half-way is another teacher; the manifest says what the reader found out."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, TinyTeacher(dies_at_unit=2, provenance={"precision": "float32 logits"}))
    with pytest.raises(StoreError, match=r"not read by one teacher: 000000 by .*float32.*, 000002 by .*16-bit.*Remove"):
        run(tmp_path, TinyTeacher(provenance={"precision": "16-bit logits"}))
    for unit in ("000000", "000001"):
        shutil.rmtree(tmp_path / "parts" / unit)
    store = run(tmp_path, TinyTeacher(provenance={"precision": "16-bit logits"})).store
    assert store.fingerprint["reader"] == {"precision": "16-bit logits"}


def test_long_rows_are_left_out_and_counted(tmp_path):
    rows = [*make_rows(3), {"prompt": "x", "completion": "y" * 200}]
    result = run(tmp_path, rows=rows)
    assert (result.too_long, result.store.rows) == (1, 3)
    short = CaptureConfig(top_k=8, max_length=4)
    with pytest.raises(ValueError, match=r"No supervised token.*3 are longer than max_length = 4"):
        run(tmp_path / "none", rows=make_rows(3), config=short)


@pytest.mark.parametrize("by_column", [True, False])
def test_teacher_reads_another_prompt(tmp_path, by_column):
    """Context distillation: the student's tokens, the teacher's distribution after its own prompt."""
    rows = make_rows(4)
    if by_column:
        rows = [row | {"teacher_prompt": f"Hint {row['answer']}. {row['prompt']}"} for row in rows]
    else:
        options = TeacherContextOptions("template", teacher_context_template="Hint {{ answer }}. {{ prompt }}")
        rows = with_teacher_prompts(rows, options)
    store = run(tmp_path, rows=rows).store
    row = store.row(3)
    plain = tokenize_example(make_tokenizer(), {"prompt": "3 and 3: ", "completion": "it is 6.!!!"})
    assert row.input_ids.tolist() == plain.input_ids
    hinted = tokenize_example(make_tokenizer(), {"prompt": "Hint 6. 3 and 3: ", "completion": "it is 6.!!!"})
    log_p = dense_log_probs(make_model(), hinted.input_ids).log_softmax(-1)
    first = next(t for t, label in enumerate(hinted.labels) if label != -100)
    records = store.read(np.arange(row.offset, row.offset + row.count))
    for place in range(row.count):
        np.testing.assert_allclose(
            records.log_probs[place], log_p[first + place - 1][records.ids[place].tolist()].numpy(), atol=0.07
        )


def test_audit_finds_the_teacher_and_tells_another(tmp_path):
    store = run(tmp_path).store
    teacher = TinyTeacher()()
    audit = audit_store(store, teacher, make_tokenizer(), num_rows=5)
    assert audit.kl.mean() < 1e-5
    assert audit.same_top1 == 1.0
    assert list(audit.coverage) == [1, 5]
    other = TransformersReader(make_model(seed=1), make_tokenizer(), 8, CONFIG.temperatures)
    assert audit_store(store, other, make_tokenizer(), num_rows=5).kl.mean() > 0.1


def test_head_makes_logits_a_tile_at_a_time(monkeypatch):
    """Never tokens × vocabulary, and the tiles do not show in the records."""
    head = LanguageModelHead(make_model(), range(259))
    hidden = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    whole = head.records(hidden, 8, (1.0, 2.0))
    monkeypatch.setattr(head_module, "_TILE_BYTES_CPU", 4 * 264 * 16)
    made, logits = [], head.logits
    monkeypatch.setattr(head, "logits", lambda tile: made.append(len(tile)) or logits(tile))
    tiled = head.records(hidden, 8, (1.0, 2.0))
    assert max(made) == 16
    assert sum(made) == 100
    assert (tiled.ids == whole.ids).all()
    np.testing.assert_allclose(tiled.log_probs, whole.log_probs, atol=1e-5)
    np.testing.assert_allclose(tiled.log_sum_exp, whole.log_sum_exp, atol=1e-5)


def test_head_knows_the_tail_of_a_sharp_teacher():
    """e^-120 of the mass, of which neither a difference nor float32 keeps anything; padding rows are part of it."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    hidden = 4 * torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    records = LanguageModelHead(model, range(259)).records(hidden, 8, (1.0, 2.0))
    logits = (hidden.double() @ model.lm_head.weight.double().T).detach()
    for column, temperature in enumerate((1.0, 2.0)):
        log_p = (logits / temperature).log_softmax(-1)
        rest = log_p.scatter(1, torch.from_numpy(records.ids).long(), -torch.inf).logsumexp(-1)
        np.testing.assert_allclose(records.log_tail[:, column], rest, rtol=1e-5, atol=1e-4)
    assert records.log_tail.min() < -90


def test_head_follows_scale_and_cap():
    """Granite divides its logits, Gemma 2 caps them: both, against the plain formula."""
    model = make_model()
    model.config.logits_scaling, model.config.final_logit_softcapping = 4.0, 3.0
    hidden = torch.randn(5, 32)
    expected = 3.0 * torch.tanh(model.lm_head(hidden) / 4.0 / 3.0)
    torch.testing.assert_close(LanguageModelHead(model, range(259)).logits(hidden), expected.detach())
    with pytest.raises(ValueError, match="does something to its logits"):  # the model's own forward does neither
        TransformersReader(model, make_tokenizer(), 8, (1.0,))


def test_sixteen_bit_head_gives_float32_logits():
    model = make_model().to(torch.bfloat16)
    hidden = torch.randn(6, 32, dtype=torch.bfloat16)
    logits = LanguageModelHead(model, range(259)).logits(hidden)
    torch.testing.assert_close(logits, hidden.float() @ model.lm_head.weight.float().t(), rtol=1e-6, atol=1e-6)


def test_config_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="temperatures are > 0"):
        CaptureConfig(temperatures=(0.0,))
    with pytest.raises(ValueError, match="top_k"):
        CaptureConfig(top_k=0)
    with pytest.raises(ValueError, match="only 259 tokens"):
        TransformersReader(make_model(), make_tokenizer(), 260, (1.0,))
