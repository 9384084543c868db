import random
import re

import networkx
import numba
import numpy as np
import pyarrow.parquet as pq
import pytest
from data_corpus import sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.data import dedup, records, sketches

N, THRESHOLD = 5, 0.8


def row(name, text, timestamp=0):
    return {"record_id": name, "source": f"folder:t/{name}", "text": text, "timestamp": timestamp}


def write(folder, rows, parts=1, **columns):
    """The rows in so many files, in row groups of seven; `kept` and the like as further columns."""
    table, paths = records.table(rows), []
    for name, values in columns.items():
        table = table.append_column(name, [values])
    for k in range(parts):
        paths.append(folder / f"{len(list(folder.iterdir())):05}.parquet")
        part = table.slice(k * len(rows) // parts, (k + 1) * len(rows) // parts - k * len(rows) // parts)
        pq.write_table(part, paths[-1], row_group_size=7)
    return paths


def run(folder, rows, trust=None, n=N, threshold=THRESHOLD, **more):
    return dedup.deduplicate(write(folder, rows), trust or {}, n, threshold, **more).to_pylist()


def shingles(text, n=N):
    words = re.findall(rb"[0-9A-Za-z_\x80-\xff]+", text.encode().lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def exact(a, b, n=N):
    """Jaccard of word shingles with Python's own sets."""
    a, b = shingles(a, n), shingles(b, n)
    return len(a & b) / max(1, len(a | b))


def corpus(documents=150, copies=90):
    """Documents and changed copies of some, at similarities from near 0.5 to 1; and the trust of each."""
    rng, made = random.Random(5), []
    for k in range(documents):
        made.append(row(f"{k}", sentence(k, 200 + k), timestamp=k))
    for k in range(copies):
        words = made[k]["text"].split()
        for place in rng.sample(range(len(words)), k % 14):
            words[place] = f"changed{rng.randrange(10**6)}"
        made.append(row(f"copy{k}", " ".join(words), timestamp=k))
    return made, {item["record_id"]: rng.choice([0.6, 0.9]) for item in made}


@pytest.mark.parametrize("n", [1, 3, 5])
def test_jaccard_kernels_equal_python_sets(n):
    texts = ["a b c d e f g", "A b; c d e f h", "Ünï ☃ x_1 2", "", "   ", "one two", "one two", "x " * 30]
    texts += [sentence(1, 50), sentence(2, 50), sentence(1, 49)]
    raw = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, raw)])
    hashes, sizes = sketches.shingle_sets(np.frombuffer(b"".join(raw), np.uint8), ends, np.arange(len(raw)), n)
    assert sizes.tolist() == [len(shingles(text, n)) for text in texts]
    a, b = np.divmod(np.arange(len(texts) ** 2), len(texts))
    found = sketches.jaccards(hashes, np.cumsum([0, *sizes]), a, b)
    assert found.tolist() == [exact(texts[x], texts[y], n) for x, y in zip(a, b, strict=True)]


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join), max_size=14), st.data())
@settings(max_examples=40)
def test_every_removal_is_a_verified_pair_and_of_each_component_the_best_stays(tmp_path_factory, texts, data):
    trust = {f"{k:02}": data.draw(st.sampled_from([0.5, 0.9])) for k in range(len(texts))}
    text = {f"{k:02}": body for k, body in enumerate(texts)}
    found = run(tmp_path_factory.mktemp("parts"), [row(*item) for item in text.items()], trust, n=2, threshold=0.5)
    stays = set(text) - {item["removed"] for item in found}
    assert len(found) == len({item["removed"] for item in found}) and {item["kept"] for item in found} <= stays
    joined = networkx.Graph((item["removed"], item["linked"]) for item in found)
    for item in found:
        a, b, through = item["removed"], item["kept"], item["linked"]
        same = text[a] == text[b]
        assert item["kind"] == ("exact" if same else "near") and (through == b or not same)
        assert item["jaccard"] == (1.0 if same else exact(text[a], text[through], 2)) >= 0.5
    for group in networkx.connected_components(joined):
        best = min(group, key=lambda name: (-trust[name], -len(text[name].encode()), name))
        kept = {item["kept"] for item in found if item["removed"] in group}
        assert len(kept) == 1 and best in kept | (group - stays)  # the strongest links alone need not reach the kept
    assert len({text[name] for name in stays}) == len(stays)  # of the same bytes one stays, whatever they are


def components(rows):
    """Connected components of the graph of all pairs by Python's own sets, as sets of record ids."""
    graph = networkx.Graph()
    graph.add_nodes_from(item["record_id"] for item in rows)
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i] if exact(a["text"], b["text"]) >= THRESHOLD]
    graph.add_edges_from((a["record_id"], b["record_id"]) for a, b in pairs)
    return list(networkx.connected_components(graph))


def test_hardly_a_duplicate_stays(tmp_path):
    rows, trust = corpus()
    found = run(tmp_path, rows, trust)
    gone = {item["removed"] for item in found}
    kept = [item["text"] for item in rows if item["record_id"] not in gone]
    left = [(a, b) for i, a in enumerate(kept) for b in kept[:i] if exact(a, b) >= THRESHOLD]
    assert len(gone) > 30 and len(left) <= 1, f"{len(left)} duplicate pairs beside {len(gone)} were missed"
    assert {item["kind"] for item in found} == {"exact", "near"}


def test_neither_order_nor_parts_nor_threads_matter(tmp_path):
    rows, trust = corpus()
    old, new = rows[:30], rows[30:]
    expected, threads = None, numba.get_num_threads()
    for seed, parts in enumerate((1, 2, 5)):
        rng, folder = random.Random(seed), tmp_path / f"{seed}"
        folder.mkdir()
        earlier = write(folder, rng.sample(old, len(old)), parts)
        paths = write(folder, rng.sample(new, len(new)), parts)
        numba.set_num_threads(min(threads, 1 + seed % 2))
        found = dedup.deduplicate(rng.sample(paths, parts), trust, N, THRESHOLD, earlier)
        numba.set_num_threads(threads)
        expected = expected or found
        assert found.equals(expected)
    assert set(expected["kind"].to_pylist()) == {"exact", "near", "earlier"}


def test_the_kept_one_is_best_by_trust_then_length_then_age_then_id(tmp_path):
    text = sentence(1, 100)
    longer = text + " and more"
    rows = [row("z", longer, 5), row("b", longer, 1), row("c", text, 0), row("d", text, 7)]
    trust = {"z": 0.9, "b": 0.8, "c": 0.8, "d": 0.8}
    found = run(tmp_path, rows[::-1], trust)
    near = exact(longer, text)
    assert [(item["removed"], item["kind"], item["jaccard"]) for item in found] == [
        ("b", "exact", 1.0),
        ("c", "near", near),
        ("d", "near", near),
    ]
    assert {item["kept"] for item in found} == {"z"}
    for trust, kept in (({}, "b"), ({"c": 0.9, "d": 0.9}, "c"), ({"c": 0.9, "d": 0.91}, "d")):
        assert {item["kept"] for item in run(tmp_path, rows, trust)} == {kept}
    twins = [row("y", text), row("x", text)]
    assert [item["kept"] for item in run(tmp_path, twins)] == ["x"]


def test_an_earlier_corpus_is_better_than_any_and_loses_nothing(tmp_path):
    text = sentence(1, 100)
    other = sentence(2, 100)
    earlier = write(tmp_path, [row("a", text), row("old", text), row("older", text + " more"), row("o", other)])
    rows = [row("a", text), row("b", text + " longer still"), row("c", sentence(9, 80)), row("o", other + " new")]
    found = run(tmp_path, rows, {"b": 1.0}, earlier=earlier)
    assert [(item["removed"], item["kept"], item["kind"]) for item in found] == [
        ("a", "a", "earlier"),
        ("b", "older", "earlier"),
        ("o", "o", "earlier"),
    ]
    assert found[0]["jaccard"] == 1.0 > found[1]["jaccard"] >= THRESHOLD


def test_of_a_chain_one_stays_and_each_removal_names_the_pair_that_speaks_for_it(tmp_path):
    words = sentence(3, 100).split()
    chain = [" ".join(words[k : k + 60]) for k in (0, 5, 10)]
    assert exact(chain[0], chain[2]) < THRESHOLD < exact(chain[0], chain[1])
    found = run(tmp_path, [row(f"{k}", text) for k, text in enumerate(chain)], {"0": 0.9, "1": 0.8, "2": 0.7})
    assert [(item["removed"], item["kept"], item["linked"]) for item in found] == [("1", "0", "0"), ("2", "0", "1")]
    assert [item["jaccard"] for item in found] == [exact(chain[0], chain[1]), exact(chain[1], chain[2])]


def test_one_record_of_each_component_of_all_pairs_stays(tmp_path):
    rows, trust = corpus()
    found = run(tmp_path, rows, trust)
    about = {
        item["record_id"]: (-trust[item["record_id"]], -len(item["text"].encode()), item["timestamp"]) for item in rows
    }
    best = {name: min(group, key=lambda one: (*about[one], one)) for group in components(rows) for name in group}
    expected = {name: kept for name, kept in best.items() if name != kept}
    made = {item["removed"]: item["kept"] for item in found}
    differ = {name for name in {*made, *expected} if made.get(name) != expected.get(name)}
    assert len(expected) > 30 and len(differ) <= 1, f"{differ} differ from all pairs"


@pytest.mark.parametrize("texts", [[], ["only one document here"], ["", "  "], ["...", "!!!"], ["a b", "a c", "a"]])
def test_little_or_no_text(tmp_path, texts):
    assert run(tmp_path, [row(f"{k}", text) for k, text in enumerate(texts)]) == []


def test_short_documents_are_one_shingle_and_empty_ones_their_own_bytes(tmp_path):
    rows = [row("a", "One two"), row("b", "one, two"), row("c", "two one"), row("d", ""), row("e", ""), row("f", " ")]
    assert [(i["removed"], i["kept"], i["kind"]) for i in run(tmp_path, rows)] == [
        ("a", "b", "near"),
        ("e", "d", "exact"),
    ]


def test_many_of_the_same_words_leave_one(tmp_path):
    text = sentence(1, 60)
    rows = [row(f"{k:04}", text.replace(" ", "  ", k % 50)) for k in range(600)]
    found = run(tmp_path, rows)
    assert len(found) == 599 and {item["kept"] for item in found} == {"0049"}  # the longest, of them the first


def test_dropped_rows_do_not_count(tmp_path):
    text = sentence(1, 60)
    rows, trust = [row(f"{k}", text) for k in range(3)], {"0": 1.0}
    found = dedup.deduplicate(write(tmp_path, rows, kept=[False, True, True]), trust, N, THRESHOLD).to_pylist()
    assert [(item["removed"], item["kept"]) for item in found] == [("2", "1")]


def test_a_record_id_that_is_not_unique_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1 records .*record_id.*source of its own"):
        run(tmp_path, [row("a", "x"), row("a", "y")])


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold):
    bands, width = dedup.shape_for(threshold)
    assert bands * width <= sketches.SIZE and 1 - (1 - threshold**width) ** bands >= 0.98


def test_sketches_estimate_the_jaccard():
    base, found = [f"w{k}" for k in range(400)], []
    for seed in range(40):
        other = base.copy()
        for place in random.Random(seed).sample(range(400), 10):
            other[place] = f"other{seed}"
        raw = [" ".join(words).encode() for words in (base, other)]
        ends = np.cumsum([0, *map(len, raw)])
        made = sketches.sketch(np.frombuffer(b"".join(raw), np.uint8), ends, np.arange(2), N)
        found.append(sketches.agreement(made, 0, 1) - exact(raw[0].decode(), raw[1].decode()))
    assert abs(np.mean(found)) < 0.03 and np.std(found) < 1.5 * (0.8 * 0.2 / sketches.SIZE) ** 0.5
