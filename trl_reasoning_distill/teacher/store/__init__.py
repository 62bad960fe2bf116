"""`TopKStore`: rows of tokens, and what the teacher said at each supervised position of them, on disk.

    store/
      manifest.json       what made it, how it is laid out, checksums; written last
      rows.parquet        token ids, which of them are supervised, a hash per row, and the text they came from
      shards/00000.topk   the records, in compressed blocks (see `codec.py`)

Records are numbered from 0 through the whole store, one per supervised position t ≥ 1, row after row. A token carries the number
of its record (`kd_index`) wherever it goes, so that shuffling, packing and truncation cannot part them.

    store = TopKStore.open("runs/capture/store")
    records = store.read(store.row(0).kd_index[store.row(0).kd_index >= 0])
    records.ids, records.at_temperature(2.0)
"""

from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store.reading import StoredRow, TopKStore
from trl_reasoning_distill.teacher.store.shard import StoreError
from trl_reasoning_distill.teacher.store.writing import TopKStoreWriter

__all__ = ["StoreError", "StoredRow", "TopKLogProbs", "TopKStore", "TopKStoreWriter"]
