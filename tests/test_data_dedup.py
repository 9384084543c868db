import random
import re

import numpy as np
import pytest
from data_corpus import sentence

from stackpkg.data import dedup
from stackpkg.data.provenance import Record

N, THRESHOLD = 5, 0.8


def record(name, text, trust=0.5, timestamp=0):
    return Record(f"folder:t/{name}", "d", "MIT", timestamp, text, trust=trust)


def exact(a, b, n=N):
    """Jaccard of word shingles with Python's own sets."""
    parts = []
    for text in (a, b):
        words = re.findall(rb"[0-9A-Za-z_\x80-\xff]+", text.encode().lower())
        parts.append({tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set())
    return len(parts[0] & parts[1]) / max(1, len(parts[0] | parts[1]))


def corpus(documents=150, copies=60):
    """Documents and changed copies of some, at similarities from near 0.5 to near 1."""
    rng, made = random.Random(5), []
    for k in range(documents):
        made.append(record(f"{k}", sentence(k, 200 + k), trust=rng.choice([0.6, 0.9]), timestamp=k))
    for k in range(copies):
        words = made[k].text.split()
        for place in rng.sample(range(len(words)), k % 14):
            words[place] = f"changed{rng.randrange(10**6)}"
        made.append(record(f"copy{k}", " ".join(words), trust=rng.choice([0.6, 0.9]), timestamp=k))
    return made


@pytest.mark.parametrize("n", [1, 3, 5])
def test_jaccard_kernel_equals_python_sets(n):
    texts = [
        "a b c d e f g",
        "A b; c d e f h",
        "Ünï ☃ x_1 2",
        "",
        "   ",
        "one two",
        "one two",
        sentence(1, 50),
        sentence(2, 50),
    ]
    raw = [text.encode() for text in texts]
    buffer = np.frombuffer(b"".join(raw), np.uint8)
    hashes, stops = dedup._shingles(buffer, np.cumsum([0, *map(len, raw)]), n)
    pairs = np.array([(a, b) for a in range(len(texts)) for b in range(len(texts))])
    found = dedup._jaccard(hashes, stops, pairs)
    assert found == pytest.approx([exact(texts[a], texts[b], n) for a, b in pairs])


def test_every_removal_is_verified_and_hardly_a_duplicate_stays():
    records = corpus()
    kept, removed = dedup.deduplicate(records, N, THRESHOLD)
    text = {r.record_id: r.text for r in records}
    assert len(kept) + len(removed) == len(records)
    assert {r.record_id for r in kept} >= {item.kept for item in removed}
    for item in removed:
        assert item.jaccard == pytest.approx(exact(text[item.removed], text[item.kept])) and item.jaccard >= THRESHOLD
    left = [(a, b) for i, a in enumerate(kept) for b in kept[:i] if exact(a.text, b.text) >= THRESHOLD]
    assert len(removed) > 20 and len(left) <= 1, f"{len(left)} duplicate pairs of {len(removed)} were missed"


def test_input_order_is_no_matter():
    records = corpus()
    expected = dedup.deduplicate(records, N, THRESHOLD)
    for seed in range(3):
        shuffled = random.Random(seed).sample(records, len(records))
        kept, removed = dedup.deduplicate(shuffled, N, THRESHOLD)
        assert {r.record_id for r in kept} == {r.record_id for r in expected[0]}
        assert sorted(removed) == sorted(expected[1])


def test_the_kept_one_is_best_by_trust_then_length_then_age():
    text = sentence(1, 100)
    longer = text + " and more"
    ranked = [
        record("a", longer, 0.9, 5),
        record("b", longer, 0.8, 1),
        record("c", text, 0.8, 0),
        record("d", text, 0.8, 7),
    ]
    kept, removed = dedup.deduplicate(ranked[::-1], N, THRESHOLD)
    assert [r.source for r in kept] == ["folder:t/a"]
    assert {item.kept for item in removed} == {kept[0].record_id}
    assert {(item.kind, round(item.jaccard, 3)) for item in removed} == {
        ("exact", 1.0),
        ("near", round(exact(longer, text), 3)),
    }


def test_a_chain_does_not_drag_away_what_is_not_similar_to_the_kept_one():
    words = sentence(3, 100).split()
    chain = [" ".join(words[k : k + 60]) for k in (0, 5, 10)]
    ends, next_ = exact(chain[0], chain[2]), exact(chain[0], chain[1])
    assert ends < THRESHOLD < next_
    kept, removed = dedup.deduplicate(
        [record(f"{k}", text, 0.9 - k / 10) for k, text in enumerate(chain)], N, THRESHOLD
    )
    assert {r.source for r in kept} == {"folder:t/0", "folder:t/2"} and len(removed) == 1


@pytest.mark.parametrize("texts", [[], ["only one document here"], ["", "  "], ["...", "!!!"]])
def test_little_or_no_text(texts):
    kept, removed = dedup.deduplicate([record(f"{k}", text) for k, text in enumerate(texts)], N, THRESHOLD)
    assert len(kept) == len(texts) and not removed


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_bands_find_a_pair_at_the_threshold(threshold):
    bands = dedup.bands_for(threshold)
    assert dedup.SIZE % bands == 0
    assert 1 - (1 - threshold ** (dedup.SIZE // bands)) ** bands >= 0.95
