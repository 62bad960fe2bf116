"""The store as a file format: what goes in comes out, wherever it is read from, and nothing wrong gets by."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.teacher.records import make_records
from trl_reasoning_distill.data.tokenization import row_hash
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store import StoreError, TopKStore, TopKStoreWriter
from trl_reasoning_distill.teacher.store.writing import manifest_text

FINGERPRINT = {"teacher": "a/teacher", "tokenizer": "abc", "dtype": "float32"}


def write_store(
    path: Path, *, rows: int = 12, block_size: int = 16, shard_blocks: int = 3, encoding="compact", top_k=6, seed=0
):
    """A small store of several shards, and the records that went in."""
    rng = np.random.default_rng(seed)
    written = []
    with TopKStoreWriter(
        path,
        top_k=top_k,
        temperatures=(1.0, 2.0),
        fingerprint=FINGERPRINT,
        encoding=encoding,
        block_size=block_size,
        shard_blocks=shard_blocks,
    ) as writer:
        for number in range(rows):
            length = int(rng.integers(2, 30))
            ids = rng.integers(0, 1000, length)
            labels = np.where(rng.random(length) < 0.7, ids, -100)
            records = make_records(np.count_nonzero(labels[1:] != -100), top_k, seed=number)
            writer.add(ids.tolist(), labels.tolist(), records, {"text": f"row {number}"})
            written.append((ids, labels, records))
    return written


@pytest.mark.parametrize("encoding", ["compact", "lossless"])
def test_rows_and_records_come_back(tmp_path, encoding):
    written = write_store(tmp_path / "store", encoding=encoding)
    store = TopKStore.open(tmp_path / "store", cache_blocks=2)
    assert len(store) == sum(len(records) for *_, records in written)
    assert store.rows == len(written)
    assert len(store.manifest["shards"]) > 2
    for number, (row, (ids, labels, records)) in enumerate(zip(store, written, strict=True)):
        assert row.input_ids.tolist() == ids.tolist()
        assert row.labels.tolist() == labels.tolist()
        assert row.hash == row_hash(ids.tolist(), labels.tolist())
        assert store.find_row(row.hash) == number
        assert store.example(number) == {"text": f"row {number}"}
        read = store.read(row.kd_index[row.kd_index >= 0])
        assert (read.ids == records.ids).all()
        tolerance = 0 if encoding == "lossless" else 0.07
        np.testing.assert_allclose(read.log_probs, records.log_probs, atol=tolerance, rtol=0)
        np.testing.assert_allclose(read.at_temperature(2.0), records.at_temperature(2.0), atol=tolerance, rtol=0)
    assert store.find_row("0" * 32) is None


def test_positions_can_be_read_in_any_order(tmp_path):
    written = write_store(tmp_path, encoding="lossless")
    store = TopKStore.open(tmp_path, cache_blocks=1)
    everything = TopKLogProbs.concatenate([records for *_, records in written])
    rng = np.random.default_rng(1)
    wanted = [rng.integers(0, len(store), 300), np.arange(len(store)), np.arange(len(store))[::-1], [3], [5, 5, 5]]
    wanted += [np.arange(*sorted(rng.choice(len(store), 2, replace=False))) for _ in range(20)]  # over block borders
    for indices in wanted:
        read = store.read(indices)
        assert (read.ids == everything.ids[indices]).all()
        assert (read.log_probs == everything.log_probs[indices]).all()
        assert (read.log_sum_exp == everything.log_sum_exp[indices]).all()
    read.ids[:] = 0  # what was read is the reader's own
    assert (store.read(indices).ids == everything.ids[indices]).all()
    assert len(store.read([])) == 0
    for outside in (-1, len(store)):
        with pytest.raises(IndexError, match=f"asked for {outside}"):
            store.read([outside])


def test_dataset_points_each_token_at_its_record(tmp_path):
    written = write_store(tmp_path)
    store = TopKStore.open(tmp_path)
    offset = 0
    for row, (ids, labels, records) in zip(store.dataset(), written, strict=True):
        assert row["input_ids"] == ids.tolist()
        assert row["labels"] == labels.tolist()
        has_record = [t for t, label in enumerate(labels) if t and label != -100]
        assert [row["kd_index"][t] for t in has_record] == list(range(offset, offset + len(records)))
        assert sum(index >= 0 for index in row["kd_index"]) == len(records)
        offset += len(records)


def test_worker_process_reads_the_same(tmp_path):
    write_store(tmp_path)
    store = TopKStore.open(tmp_path)
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.read([3, 50]).log_probs == store.read([3, 50]).log_probs).all()


def test_same_rows_make_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        write_store(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)


def read_everything(path: Path) -> None:
    """What a training and `store verify` would read."""
    store = TopKStore.open(path)
    for _ in store.verify():
        pass
    store.read(np.arange(len(store)))
    store.dataset()


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    write_store(tmp_path / "store", rows=6, top_k=3)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    rng = np.random.default_rng(0)
    read_everything(tmp_path / "store")
    for case in range(1200):
        file = files[case % len(files)]
        intact = file.read_bytes()
        if case % 10 == 0:
            broken = intact[: rng.integers(0, len(intact))]
        elif case % 10 == 1:
            broken = intact + bytes(rng.integers(1, 9))
        else:
            position, bit = rng.integers(0, len(intact)), rng.integers(0, 8)
            broken = intact[:position] + bytes([intact[position] ^ (1 << bit)]) + intact[position + 1 :]
        file.write_bytes(broken)
        try:
            with pytest.raises(StoreError):
                read_everything(tmp_path / "store")
        except BaseException as error:
            raise AssertionError(f"case {case}: {file.name}, {len(broken)} of {len(intact)} bytes") from error
        finally:
            file.write_bytes(intact)


def test_missing_and_foreign_files_are_refused(tmp_path):
    write_store(tmp_path / "one", seed=1)
    write_store(tmp_path / "other", seed=2)
    shard = tmp_path / "one" / "shards" / "00001.topk"
    shutil.copy(tmp_path / "other" / "shards" / "00001.topk", shard)
    with pytest.raises(StoreError, match=r"00001\.topk"):
        read_everything(tmp_path / "one")
    shard.unlink()
    with pytest.raises(StoreError, match=r"00001\.topk is missing"):
        TopKStore.open(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "rows.parquet", tmp_path / "other" / "rows.parquet")
    with pytest.raises(StoreError, match="belongs to another store"):
        TopKStore.open(tmp_path / "other")


def test_unfinished_store_is_refused_and_then_replaced(tmp_path):
    def killed_run() -> None:
        with TopKStoreWriter(tmp_path, top_k=2, fingerprint={}, block_size=1, shard_blocks=1) as writer:
            writer.add([1, 2], [1, 2], make_records(1, 2, temperatures=(1.0,)))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_run()
    with pytest.raises(StoreError, match=r"unfinished.*goes on where it stopped"):
        TopKStore.open(tmp_path)
    write_store(tmp_path)
    read_everything(tmp_path)
    with pytest.raises(ValueError, match="holds a store already"):
        TopKStoreWriter(tmp_path, top_k=2, fingerprint={})


def test_newer_schema_and_other_manifests_are_refused(tmp_path):
    write_store(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(manifest_text(manifest | {"schema": 2}))
    with pytest.raises(StoreError, match=r"schema 2.*up to 1.*Upgrade"):
        TopKStore.open(tmp_path)
    file.write_text(json.dumps({"stage": "capture"}))
    with pytest.raises(StoreError, match="not the manifest of a Top-K store"):
        TopKStore.open(tmp_path)
    with pytest.raises(StoreError, match="no Top-K store"):
        TopKStore.open(tmp_path / "nowhere")


def test_shard_names_do_not_come_from_the_manifest(tmp_path):
    """Whatever a manifest says, only `shards/NNNNN.topk` inside the store is opened."""
    write_store(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0]["file"] = "../../etc/passwd"
    file.write_text(manifest_text(manifest))
    assert len(TopKStore.open(tmp_path)) == manifest["positions"]


def test_differences_are_named(tmp_path):
    write_store(tmp_path)
    store = TopKStore.open(tmp_path)
    store.check_compatible({"tokenizer": "abc", "dtype": "float32"})
    with pytest.raises(StoreError, match=r"tokenizer is 'abc' in the store, 'xyz' here.*Align it"):
        store.check_compatible({"tokenizer": "xyz", "dtype": "float32"}, remedy="Align it.")


def test_unknown_temperature_names_those_there(tmp_path):
    write_store(tmp_path)
    with pytest.raises(ValueError, match=r"1\.5 was not captured: this store has 1, 2"):
        TopKStore.open(tmp_path).read([0]).at_temperature(1.5)


@pytest.mark.parametrize(
    ("input_ids", "labels", "count", "message"),
    [
        ([1, 2, 3], [1, 2], 1, "differ in length"),
        ([1, 2, 3], [-100, 3, 3], 2, "neither −100 nor the token"),
        ([1, 2, 3], [1, 2, 3], 3, "3 records for 2 supervised positions after the first"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, input_ids, labels, count, message):
    writer = TopKStoreWriter(tmp_path, top_k=2, fingerprint={})
    with pytest.raises(ValueError, match=message):
        writer.add(input_ids, labels, make_records(count, 2, temperatures=(1.0,)))


def test_bytes_per_position_on_a_large_vocabulary(tmp_path):
    """Random logits are worse than any model's: their ids cannot be guessed. Even so it is far below float16 and int32."""
    records = make_records(4096, 25, vocab_size=2000)
    with TopKStoreWriter(tmp_path, top_k=25, temperatures=(1.0, 2.0), fingerprint={}) as writer:
        writer.add([0] * 4097, [0] * 4097, records)
    (entry,) = TopKStore.open(tmp_path).manifest["shards"]
    assert entry["bytes"] / 4096 < 0.5 * 150


@pytest.mark.parametrize("encoding", ["compact", "lossless"])
def test_a_store_of_version_0_1_0_is_read_to_the_bit(tmp_path, encoding):
    """It was written by that version, from the records that `write_store` makes; it knows no tails."""
    write_store(tmp_path / "store", rows=3, block_size=16, shard_blocks=8, encoding=encoding, top_k=4)
    today = TopKStore.open(tmp_path / "store")
    old = TopKStore.open(Path(__file__).parent / "version_0_1_0" / encoding)
    numbers = np.arange(len(old))
    ours, theirs = today.read(numbers), old.read(numbers)
    for name in ("ids", "log_probs", "log_sum_exp"):
        assert getattr(ours, name).tobytes() == getattr(theirs, name).tobytes()
    assert today.has_log_tail
    assert not old.has_log_tail
    assert theirs.log_tail is None
    assert theirs.tail_outside(np.ones(theirs.ids.shape, bool), 2.0) is None
    assert len(list(old.verify())) == 2


@pytest.mark.parametrize("encoding", ["compact", "lossless"])
def test_tails_come_back_from_every_block(tmp_path, encoding):
    written = write_store(tmp_path / "store", encoding=encoding)
    store = TopKStore.open(tmp_path / "store", cache_blocks=2)
    expected = np.concatenate([records.log_tail for *_, records in written])
    order = np.random.default_rng(0).permutation(len(store))
    np.testing.assert_allclose(store.read(order).log_tail, expected[order], atol=3e-3 if encoding == "compact" else 0)


def test_one_part_without_tails_makes_a_store_without(tmp_path):
    """A server tells no tail: what is joined with its records knows none either, and nothing is made up."""
    records = make_records(3, 4)
    with TopKStoreWriter(
        tmp_path / "store", top_k=4, temperatures=(1.0, 2.0), fingerprint={}, shard_blocks=1, block_size=2
    ) as writer:
        writer.add([1, 2, 3, 4], [1, 2, 3, 4], records)
        writer.add(
            [1, 2, 3, 4], [1, 2, 3, 4], TopKLogProbs(records.ids, records.log_probs, records.log_sum_exp, (1.0, 2.0))
        )
    store = TopKStore.open(tmp_path / "store")
    assert not store.has_log_tail
    assert store.read([0, 5]).log_tail is None


def test_the_tail_outside_any_places_is_one_minus_theirs():
    records = make_records(50, 8, scale=1.0)
    is_kept = np.random.default_rng(0).random((50, 8)) < 0.5
    for temperature in (1.0, 2.0):
        mass = (np.exp(records.at_temperature(temperature).astype(np.float64)) * is_kept).sum(axis=1)
        np.testing.assert_allclose(np.exp(records.tail_outside(is_kept, temperature)), 1 - mass, atol=1e-6)


def test_teacher_mass_is_the_mean_mass_of_the_top_k(tmp_path):
    written = write_store(tmp_path / "store", encoding="lossless")
    store = TopKStore.open(tmp_path / "store")
    for temperature in (1.0, 2.0):
        every = np.concatenate([records.at_temperature(temperature) for *_, records in written]).astype(np.float64)
        for top_k in (1, 3, 6):
            mass = np.exp(every[:, :top_k]).sum(axis=1).mean()
            assert store.teacher_mass(top_k, temperature) == pytest.approx(mass, rel=1e-6)
            assert store.teacher_mass(top_k, temperature, positions=60) == pytest.approx(mass, abs=0.1)
    assert store.teacher_mass(6, 2.0) < store.teacher_mass(6, 1.0)
    with pytest.raises(ValueError, match="holds 6 tokens per position: K = 7"):
        store.teacher_mass(7, 1.0)
    with pytest.raises(ValueError, match="Temperature 3 was not captured"):
        store.teacher_mass(1, 3.0)
