"""Personal data in the records as a second detector sees it, before and after scrubbing, and the decision of a person.

The detector is Microsoft Presidio by its pattern recognisers alone (extra `governance`), without a language model: it
knows nothing of the scrubber of `data.scrub`, and no more than that of names, which no pattern finds.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackpkg import runs
from stackpkg.data import manifest, sources
from stackpkg.data.scrub import RESERVED
from stackpkg.governance.seal import DECISIONS
from stackpkg.governance.statements import DEMONSTRATION, REVIEWER, keygen
from stackpkg.params import Params, Section

EXTRA = "the privacy review needs presidio-analyzer: pip install 'stackpkg[governance]'"
NAMES = "Names, faces, health and beliefs have no pattern: nothing here looks for them, only a reader can"
LOUD = "DEMONSTRATION REVIEWER: no person decided this"
NAMESPACE = "stackpkg-privacy"  # of the reviewer's line in governance/allowed_signers
CERTAIN = 0.35  # Presidio's own threshold for a pattern: what it scores lower is noise (a lone `::` is 0.1)
SHOWN = 20  # samples


class Found(NamedTuple):
    """A finding; `excuse` says why it is nobody's, empty where it may be somebody's."""

    kind: str
    start: int
    end: int
    excuse: str


def _excuse(kind: str, found: str) -> str:
    if kind == "EMAIL_ADDRESS" and (RESERVED.search(found) or found.lower().startswith(("git@", "hg@"))):
        return "a reserved name (RFC 2606) or a service"
    if kind == "IP_ADDRESS":
        address = ipaddress.ip_address(found.partition("%")[0])
        unicast = address.version == 4 or address.packed[0] >> 5 == 1  # 2000::/3: `::2` is a slice
        return "" if address.is_global and unicast else "not a global address (IANA registries)"
    if kind == "PHONE_NUMBER" and found.lstrip("+-").isdigit():
        return "a bare number: a telephone number is written in groups (ITU-T E.123)"
    return ""


def detector() -> Callable[[str], list[Found]]:
    """A function from a text to its findings. Raises `ValueError` without the extra."""
    try:
        import tldextract
        from presidio_analyzer import predefined_recognizers as known
    except ImportError as error:
        raise ValueError(f"{EXTRA} ({error})") from None
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list it brings: no network
    recognisers = [
        known.EmailRecognizer(), known.PhoneRecognizer(supported_regions=("US",), leniency=3), known.IbanRecognizer(),
        known.IpRecognizer(), known.CreditCardRecognizer(), known.UsSsnRecognizer(), known.UkNinoRecognizer(),
        known.MacAddressRecognizer(),
    ]  # fmt: skip

    def find(text: str) -> list[Found]:
        hits = (hit for each in recognisers for hit in each.analyze(text, each.supported_entities, None))
        spans = {(hit.entity_type, hit.start, hit.end) for hit in hits if hit.score >= CERTAIN}
        return [Found(*span, _excuse(span[0], text[span[1] : span[2]])) for span in sorted(spans)]

    return find


def shape(found: str) -> str:
    """What it looks like without what it says: digits as 0, letters as a."""
    return re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "0", found))


def _sample(files: list[Path], megabytes: float) -> Iterator[tuple[str, str, str]]:
    """(record_id, hash of what was read, text) of records that their ids choose: an id is a hash, so by chance."""
    about = [pq.ParquetFile(file).metadata for file in files]
    groups = (each.row_group(k) for each in about for k in range(each.num_row_groups))
    columns = (group.column(k) for group in groups for k in range(group.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
    limit = min(1.0, megabytes * 1e6 / max(size, 1)) * 16**16
    for file in files:
        with pq.ParquetFile(file) as part:
            for batch in part.iter_batches(1_000, columns=["record_id", "content_hash", "text"]):
                for row in batch.to_pylist():
                    if int(row["record_id"], 16) < limit:
                        yield row["record_id"], row["content_hash"], row["text"]


def _tally(found: Iterable[Found]) -> dict[str, dict[str, int]]:
    counts = dict[str, Counter[str]]()
    for each in found:
        counts.setdefault(each.kind, Counter(found=0, left=0)).update(found=1, left=int(not each.excuse))
    return {kind: dict(counts[kind]) for kind in sorted(counts)}


def _left(told: dict[str, dict[str, int]]) -> int:
    return sum(each["left"] for each in told.values())


def review(folder: runs.RunFolder, p: Params) -> dict[str, Any]:
    """Findings in the kept records (`all`) and, where a source still holds what was read, `before` and `after` for the
    same records; written to `governance/privacy_review.json`. No text of a record is in it: a sample is a place and a
    shape. At most `governance.scan_mb` megabytes are looked at.

    Raises `ValueError` without a corpus or the extra.
    """
    find, files = detector(), manifest.records(folder.path / "data")
    found, hashes, samples, characters = dict[str, list[Found]](), dict[str, str](), list[dict[str, Any]](), 0
    for name, content, text in _sample(files, p.governance.scan_mb):
        hashes[name], found[name], characters = content, find(text), characters + len(text)
        samples += [
            {"kind": each.kind, "record_id": name, "start": each.start, "shape": shape(text[each.start : each.end])}
            for each in found[name]
            if not each.excuse
        ]
    rows = (row for row in sources.read(p.data.sources, []) if hashes.get(row["record_id"]) == row["content_hash"])
    earlier = {row["record_id"]: find(row["text"]) for row in rows}
    audit = pq.read_table(folder.path / "data/audit.parquet", columns=["filter", "value", "decision"])
    masked = audit.filter(pc.equal(audit["decision"], "mask")).group_by("filter").aggregate([("value", "sum")])
    every = _tally(each for group in found.values() for each in group)
    told = {
        "detector": {name: metadata.version(name) for name in ("presidio-analyzer", "phonenumbers", "tldextract")},
        "not_looked_for": NAMES,
        "records_sha256": [runs.digest(file) for file in files],
        "records": len(hashes),
        "characters": characters,
        "compared": len(earlier),
        "all": every,
        "before": _tally(each for group in earlier.values() for each in group),
        "after": _tally(each for name in earlier for each in found[name]),
        "left": _left(every),
        "per_million": 1e6 * _left(every) / max(characters, 1),
        "masked_by_scrubber": {row["filter"]: int(row["value_sum"]) for row in masked.sort_by("filter").to_pylist()},
        "samples": sorted(samples, key=lambda s: (s["kind"], s["record_id"], s["start"]))[:SHOWN],
    }
    runs.write_json(folder / "governance/privacy_review.json", told)
    return told


class Decision(Section):
    """`governance/privacy_decision.json`: what a person decided about one review."""

    decision: Literal["approve", "approve-with-conditions", "reject"]
    reviewer: str
    date: str
    conditions: list[str]
    reason: str
    review_sha256: str
    demonstration: bool = False


def _write(folder: Path, said: Decision) -> Path:
    return runs.write_json(folder / "governance/privacy_decision.json", said.model_dump())


def decide(folder: Path, reviewer: str, key: Path, decision: str, conditions: Iterable[str], reason: str) -> Path:
    """Write a person's decision about the review of a run, and the signature of it, into the run's `governance/`.

    `reviewer` is the principal of `governance/allowed_signers`, whose line names the namespace `stackpkg-privacy`.
    Raises `ValueError` where there is no review, the decision does not fit its conditions, or the key can not sign,
    `RuntimeError` without ssh-keygen.
    """
    about = folder / "governance/privacy_review.json"
    if not about.exists():
        raise ValueError(f"{folder.name} has no privacy review to decide about: run notebook 60 first")
    if decision not in DECISIONS or bool(given := [*conditions]) != (decision == DECISIONS[1]) or not reason.strip():
        raise ValueError(f"give a reason and one of {', '.join(DECISIONS)}; the second has conditions, no other has")
    said = Decision(
        decision=decision, reviewer=reviewer, date=runs.now(), conditions=given, reason=reason,
        review_sha256=runs.digest(about),
    )  # fmt: skip
    place = folder / "governance/privacy_decision.json"
    with runs.replacing(place) as temporary:
        runs.write_json(temporary, said.model_dump())
        done = keygen("-Y", "sign", "-f", key, "-n", NAMESPACE, text=temporary.read_bytes())
        if done.returncode:
            raise ValueError(f"ssh-keygen could not sign with {key}: {done.stderr.decode(errors='replace').strip()}")
        runs.write_text(place.with_suffix(".json.sig"), done.stdout.decode())
    return place


def _why_not(folder: Path, said: Decision, p: Params) -> str:
    """Why a decision does not count; empty where it does."""
    place, signers = folder / "governance/privacy_decision.json", runs.root() / "governance/allowed_signers"
    if said.review_sha256 != runs.digest(folder / "governance/privacy_review.json"):
        return "it is about another review: the records or the findings changed since"
    if said.demonstration:
        return "" if p.governance.demonstration_keys else "a demonstration decides nothing for this profile"
    by = ("-Y", "verify", "-f", signers, "-I", said.reviewer, "-n", NAMESPACE, "-s", f"{place}.sig")
    if not REVIEWER.fullmatch(said.reviewer) or keygen(*by, text=place.read_bytes()).returncode:
        return f"it has no signature of {said.reviewer} that governance/allowed_signers confirms"
    return "" if said.decision != "reject" else f"rejected: {said.reason}"


def decided(folder: runs.RunFolder, p: Params) -> tuple[Decision | None, str]:
    """(the decision about the review as it is now, why it does not count). A profile with demonstration keys makes one
    where there is none that counts, by a reviewer who is nobody, and says so; never over one that a person signed."""
    place, found = folder.path / "governance/privacy_decision.json", None
    why = "nobody decided yet: stackpkg privacy"
    if place.exists():
        found = Decision.model_validate_json(place.read_bytes())
        why = _why_not(folder.path, found, p)
    if why and p.governance.demonstration_keys and (found is None or found.demonstration):
        found = Decision(
            decision="approve-with-conditions", reviewer=f"privacy{DEMONSTRATION}", date=runs.now(),
            conditions=[f"{NAMES}.", "A person reviews the findings and signs before anything of this run is shared."],
            reason=LOUD, review_sha256=runs.digest(folder.path / "governance/privacy_review.json"), demonstration=True,
        )  # fmt: skip
        _write(folder.path, found)
        why = ""
    return found, why
