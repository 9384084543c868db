"""The read side of the shards: memory-mapped, and checked block by block before it is used."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from stackpkg import runs
from stackpkg.data import manifest as versions

EVERY = 64  # one read in so many is checked again


class Corpus:
    """Documents of a version by number: `records`, `part`, `domain`, `split`, `shard`, `offset`, `tokens` are columns,
    `members` the numbers of each (split, domain).

    Opening reads the manifest and the index alone: a millisecond for ten thousand documents, some fifty for a million.
    A job begins with `manifest.check`. Shards are mapped, and their blocks compared with the checksums, when they are
    first read.
    """

    def __init__(self, folder: Path, version: str = "") -> None:
        path = versions.path_of(folder, version)
        self.folder, self.version, self.digest = folder, path.stem, runs.digest(path)  # the head may move on
        self.manifest = versions.parse(path)
        self.names, self._sums = [e["name"] for e in self.manifest["shards"]], versions.blocks(folder, self.manifest)
        index = versions.vouched(versions.index(folder, self.manifest), self.manifest["index_sha256"])
        self._index = pa.ipc.open_file(pa.memory_map(str(index))).get_batch(0)
        assert len(self._index) == sum(entry["documents"] for entry in self.manifest["shards"]), "an index is one batch"
        self.offset, self.tokens = (self._index[name].to_numpy() for name in ("offset", "tokens"))
        (shards, of), (splits, split), (domains, domain) = map(self._codes, ("shard", "split", "domain"))
        numbers = {name: k for k, name in reversed([*enumerate(self.names)])}  # of equal names, the first
        self.shard = np.array([numbers[name] for name in shards])[of]
        self.members = {
            (one, other): np.flatnonzero((split == splits.index(one)) & (domain == domains.index(other)))
            for one, counts in self.manifest["tokens"].items()
            for other in counts
        }
        self._size = versions.BLOCK // np.dtype(self.manifest["dtype"]).itemsize  # tokens of a block
        self._maps: dict[int, np.ndarray] = {}
        self._checked = [bytearray(len(sums)) for sums in self._sums]
        self._reads = 0

    def __reduce__(self) -> tuple:
        return Corpus, (self.folder, self.version)

    def _codes(self, name: str) -> tuple[list[str], np.ndarray]:
        """The values of a column, and the number of each document's."""
        column = self._index[name]
        return column.dictionary.to_pylist(), column.indices.to_numpy()

    @cached_property
    def records(self) -> np.ndarray:
        """object[documents], record ids."""
        return self._index["record_id"].to_numpy(zero_copy_only=False)

    @cached_property
    def part(self) -> np.ndarray:
        return self._index["part"].to_numpy()

    @cached_property
    def domain(self) -> np.ndarray:
        return self._index["domain"].to_numpy(zero_copy_only=False)

    @cached_property
    def split(self) -> np.ndarray:
        return self._index["split"].to_numpy(zero_copy_only=False)

    def find(self, records: Iterable[str]) -> np.ndarray:
        """int64[documents], the place among `records` of the one that each document is of; -1 where it is of none."""
        sought = pa.array(list(records), self._index.schema.field("record_id").type)
        return pc.fill_null(pc.index_in(self._index["record_id"], sought), -1).to_numpy()

    def tokens_of(self, shard: int) -> np.ndarray:
        """A shard, mapped. Raises `ValueError` when it is missing or has another size."""
        if shard not in self._maps:
            path, entry = self.folder / f"shards/{self.names[shard]}.bin", self.manifest["shards"][shard]
            size = path.stat().st_size if path.exists() else 0
            if size != entry["tokens"] * np.dtype(self.manifest["dtype"]).itemsize:
                raise ValueError(f"corrupt or missing: shards/{path.name}; runbook CorruptedShardRollback")
            self._maps[shard] = np.asarray(np.memmap(str(path), self.manifest["dtype"], "r"))
        return self._maps[shard]

    def read(self, document: int, begin: int, count: int) -> np.ndarray:
        """uint16 or uint32[count], tokens of a document from `begin`. Raises `ValueError` for a block that changed."""
        shard, first = self.shard.item(document), self.offset.item(document) + begin
        tokens, checked = self.tokens_of(shard), self._checked[shard]
        self._reads += 1
        for k in range(first // self._size, (first + count - 1) // self._size + 1):
            if not checked[k] or self._reads % EVERY == 0:
                self.check(shard, k)
        return tokens[first : first + count]

    def check(self, shard: int, k: int) -> None:
        """Compare block k of a shard with its checksum."""
        block = self.tokens_of(shard)[k * self._size : (k + 1) * self._size]
        if xxhash.xxh3_64_intdigest(block.data) != int(self._sums[shard][k]):
            self._checked[shard][k] = 0
            raise ValueError(f"corrupt block {k} of shards/{self.names[shard]}.bin; runbook CorruptedShardRollback")
        self._checked[shard][k] = 1
