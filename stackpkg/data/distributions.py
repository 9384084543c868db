"""Text of the Python packages installed on this machine, with licence and published hashes from their metadata."""

import base64
import csv
import hashlib
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from stackpkg.data.items import LARGEST, UNREADABLE, Item, domain_of
from stackpkg.data.provenance import spdx

SHARES = {"code": 0.6, "documentation": 0.25, "licences": 0.15}  # of the bytes taken from distributions


def items(domain: str = "", licence: str = "") -> Iterator[Item]:
    """Files of every installed wheel, in an order that names alone decide: the domain most behind its share is next,
    in it distributions take turns; in each, files go by the hash of their path. Broken distributions come first.

    `domain` and `licence`, where given, are those of every file.
    """
    queues: dict[str, list[tuple[int, bytes, int, Item]]] = {name: [] for name in SHARES}
    found: dict[str, metadata.Distribution] = {}
    for wheel in metadata.distributions():
        found.setdefault(str(wheel.metadata["Name"]).lower(), wheel)
    found.pop("stackpkg", None)
    for name in sorted(found):
        turns, order = Counter[str](), hashlib.sha256(name.encode()).digest()
        try:
            for home, size, item in sorted(_files(name, found[name], licence), key=_by_path):
                turns[home] += 1
                queues[home].append((-turns[home], order, size, item._replace(domain=domain or home)))
        except UNREADABLE as error:
            yield Item(f"pypi:{name}", error)
    for queue in queues.values():
        queue.sort(key=lambda entry: entry[:2])
    taken = dict.fromkeys(SHARES, 0)
    while waiting := [name for name in queues if queues[name]]:
        home = min(waiting, key=lambda name: taken[name] / SHARES[name])
        *_, size, item = queues[home].pop()
        taken[home] += size if size <= LARGEST else 0
        yield item


def _by_path(entry: tuple[str, int, Item]) -> bytes:
    return hashlib.sha256(entry[2].source.partition("/")[2].encode()).digest()


def _files(name: str, wheel: metadata.Distribution, licence: str) -> list[tuple[str, int, Item]]:
    """(domain, bytes, item) of every text file in the RECORD of a wheel (PEP 376, PEP 427)."""
    about, made = wheel.metadata, []
    if about["Name"] is None:
        raise ValueError("its METADATA has no Name")
    stated = licence or spdx(
        about["License-Expression"] or "", about["License"] or "", *about.get_all("Classifier", [])
    )
    for path, digest, size in csv.reader((wheel.read_text("RECORD") or "").splitlines()):
        home = "documentation" if path.endswith(".dist-info/METADATA") else domain_of(path)
        if home and not path.startswith(("..", "/")):
            kind, _, value = digest.partition("=")
            sha = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex() if kind == "sha256" else ""
            file, label = Path(str(wheel.locate_file(path))), f"pypi:{name}=={about['Version']}/{path}"
            made.append((home, int(size or 0), Item(label, file, "", {"licence": stated, "content_hash": sha})))
    return made
