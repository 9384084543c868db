"""The read side of the shards: memory-mapped, checked when opened and, by samples, while it is read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from stackpkg import runs
from stackpkg.data import manifest as versions

OPENING = 1024  # blocks checked at opening, 1 GiB, or one of each shard: all of a smaller corpus
EVERY = 64  # one read in so many is checked again


class Corpus:
    """Documents of a version by number: `records`, `part`, `domain`, `split`, `shard`, `offset`, `tokens` are columns,
    `members` the numbers of each (split, domain). Raises `ValueError` that names every file that is not the manifest's.
    """

    def __init__(self, folder: Path, version: str = "") -> None:
        path = versions.path_of(folder, version)
        self.folder, self.version, self.digest = folder, path.stem, runs.digest(path)  # the head may move on
        self.manifest = versions.read(folder, self.version)
        share = -(-OPENING // len(self.manifest["shards"]))  # of one shard
        if broken := versions.verify(folder, self.version, sample=share):
            raise ValueError(f"corrupt or missing: {', '.join(broken)}; notebook 11 shows the way back")
        self.names = [entry["name"] for entry in self.manifest["shards"]]
        self._paths = [folder / f"shards/{name}.bin" for name in self.names]
        self._maps = [np.asarray(np.memmap(path, self.manifest["dtype"], "r")) for path in self._paths]
        self._sums, self._reads = [versions.sums(path) for path in self._paths], 0
        index = pq.read_table(versions.index(folder, self.manifest), use_threads=False)
        self.records, self.domain, self.split = (index[name].to_numpy() for name in ("record_id", "domain", "split"))
        self.offset, self.tokens, self.part = (index[name].to_numpy() for name in ("offset", "tokens", "part"))
        self.shard = pc.index_in(index["shard"], value_set=pa.array(self.names)).to_numpy()
        self.members = {
            (split, domain): np.flatnonzero((self.split == split) & (self.domain == domain))
            for split, counts in self.manifest["tokens"].items()
            for domain in counts
        }

    def __reduce__(self) -> tuple:
        return Corpus, (self.folder, self.version)

    def read(self, document: int, begin: int, count: int) -> np.ndarray:
        """uint16 or uint32[count], tokens of a document from `begin`. Raises `ValueError` for a block that changed."""
        shard, first = self.shard[document], self.offset[document] + begin
        self._reads += 1
        if self._reads % EVERY == 0:
            self.check(shard, first, count)
        return self._maps[shard][first : first + count]

    def check(self, shard: int, first: int, count: int) -> None:
        """Compare the blocks that hold these tokens with their checksums."""
        size = versions.BLOCK // self._maps[shard].itemsize
        for k in range(first // size, (first + count - 1) // size + 1):
            if xxhash.xxh3_64_intdigest(self._maps[shard][k * size : (k + 1) * size].data) != int(self._sums[shard][k]):
                raise ValueError(
                    f"corrupt block {k} of shards/{self.names[shard]}.bin, changed since it was opened; "
                    "notebook 11 shows the way back"
                )
