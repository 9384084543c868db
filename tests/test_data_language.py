"""Language of real sentences; perplexity that ranks damaged text above clean text, and never knows its own document."""

import hashlib
import random
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackpkg.data import filters, language, perplexity, records
from stackpkg.data.perplexity import GRID, SLOTS, Model
from stackpkg.params import Data

ARTICLE_1 = {  # Universal Declaration of Human Rights, articles 1 and 3
    "en": "All human beings are born free and equal in dignity and rights. Everyone has the right to life and liberty.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Jeder hat das Recht auf Leben.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Tout individu a droit à la vie.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos. Todos tienen derecho a la vida.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Ogni individuo ha diritto alla vita.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Każdy ma prawo do życia.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Каждый человек имеет право на жизнь.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由，在尊严和权利上一律平等。人人有权享有生命、自由和人身安全。",
}
VERBS = ["sees", "carries", "paints", "follows", "describes", "repairs", "remembers", "measures"]
NOUNS = ["river", "letter", "engine", "garden", "teacher", "window", "mountain", "ship", "bridge", "story", "clock"]
PLACES = ["under the old tree", "before the long winter", "near the harbour", "after the rain", "in the quiet library"]


def clean(rng, sentences=30):
    """A grammar with a little variation: enough order for an n-gram model to learn in a test."""
    made = []
    for _ in range(sentences):
        noun, other, verb, place = (rng.choice(items) for items in (NOUNS, NOUNS, VERBS, PLACES))
        made.append(f"The {rng.choice(NOUNS)} of the {noun} {verb} the {other} {place}.")
    return " ".join(made)


def corpus(n=300, seed=1):
    rng = random.Random(seed)
    return [clean(rng) for _ in range(n)]


def table(texts, code="en", score=0.9, domain="web"):
    made = records.table(
        {"record_id": f"{k:x}", "source": f"t/{k}", "domain": domain, "text": text, "content_hash": digest(text)}
        for k, text in enumerate(texts)
    )
    made = made.append_column("language", pa.array([code] * len(texts), pa.string()))
    return made.append_column("language_score", pa.array([score] * len(texts), pa.float64()))


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    texts, parts = corpus(), []
    for k in range(3):
        parts.append(folder / f"{k}.parquet")
        pq.write_table(table(texts[100 * k : 100 * k + 100]), parts[-1])
    return texts, parts, perplexity.fit(parts, folder / "a", Data())


@pytest.mark.parametrize("code", ARTICLE_1)
def test_a_sentence_is_told_from_every_other_language(code):
    found, score = language.language_of(ARTICLE_1[code])
    assert found == code and 0.3 < score <= 1
    assert language.language_of(ARTICLE_1[code] * 200)[0] == code


@pytest.mark.parametrize("text", ["", " \n", "123 456.7 = 99", "\x00\ufffd", "-- ++ //"])
def test_a_text_without_words_is_undecided(text):
    assert language.language_of(text) == ("", 0.0)


def test_identify_appends_its_columns_once():
    out = language.identify(table([*ARTICLE_1.values(), "12"], code="xx"))
    assert out["language"].to_pylist() == [*ARTICLE_1, ""] and out["language_score"][-1].as_py() == 0
    assert language.identify(out).equals(out) and out.column_names.count("language") == 1
    assert language.identify(out.slice(0, 0)).schema == out.schema


def test_the_middle_of_a_long_text_has_a_say():
    assert len(language.sample("x" * 10**6)) == 3 * language.SLICE + 2
    assert ARTICLE_1["de"] in language.sample("a" * 5000 + ARTICLE_1["de"] + "b" * 5000)


def auc(low, high):
    """Probability that an item of `high` ranks above one of `low` (Mann and Whitney 1947)."""
    return float(np.mean([[(b > a) + (a == b) / 2 for a in low] for b in high]))


def test_damaged_text_ranks_above_clean_text(trained):
    texts, _, (path,) = trained
    model, rng = perplexity.load(path.parent, "en"), random.Random(3)

    def shuffled(text):
        words = text.split()
        rng.shuffle(words)
        return " ".join(words)

    def noisy(text):
        return "".join(rng.choice(string.ascii_lowercase + " ") if rng.random() < 0.1 else c for c in text)

    def ppl(items):
        return perplexity.perplexities(items, [digest(text) for text in items], model)

    fresh = corpus(60, seed=2)
    base = ppl(fresh)
    assert 2 < np.median(base) < 40 and np.median(ppl(texts)) == pytest.approx(np.median(base), rel=0.05)
    assert auc(base, ppl([shuffled(text) for text in fresh])) > 0.99
    assert auc(base, ppl([noisy(text) for text in fresh])) > 0.99
    assert auc(base, ppl([text * 8 for text in ARTICLE_1.values()])) > 0.99
    assert (
        auc(base, ppl([f"{string.capwords(shuffled(text))[:60]}\n" * 40 for text in fresh])) > 0.95
    )  # headings, repeated


def test_a_document_is_not_scored_by_its_own_words(trained):
    texts, _, (path,) = trained
    model = perplexity.load(path.parent, "en")
    odd = " ".join(f"glorp{k} zanth{k} quibble{k}" for k in range(400))
    with_odd = [*texts, odd, odd]
    after = perplexity._train(with_odd, [digest(text) for text in with_odd])
    before, later = (perplexity.perplexities([odd], [digest(odd)], m)[0] for m in (model, after))
    assert later == pytest.approx(before, rel=0.05) and later > 1e4  # its exact copy is in the same fold
    known = perplexity.perplexities(
        [odd], [next(f"{k}" for k in range(99) if fold(str(k)) != fold(digest(odd)))], after
    )
    assert known[0] < later / 100  # the other side would know it


def fold(content):
    return perplexity._draw(content) & 1


def test_scores_agree_with_the_formula(trained):
    """Interpolated probabilities of a four-word text from dictionaries of counts."""
    train, asked = ["a b c a b d", "a b c"], "a b c x"
    one = Model(np.zeros((2, int(SLOTS)), np.uint32), np.zeros(2, np.int64), np.zeros(len(GRID)))
    words, stops = perplexity.hashes(train)
    for side in (0, 1):
        perplexity._count(words, stops, one.counts[side])
        one.words[side] = len(words)
    grams = {}
    for text in train:
        w = text.split()
        for n in (1, 2, 3):
            for k in range(len(w) - n + 1):
                grams[tuple(w[k : k + n])] = grams.get(tuple(w[k : k + n]), 0) + 1
    total, w = 0.0, asked.split()
    for i in range(len(w)):
        p = perplexity.UNSEEN
        for n in range(1, min(3, i + 1) + 1):
            gram = tuple(w[i - n + 1 : i + 1])
            context = grams.get(gram[:-1], 0) if n > 1 else 9
            p = (grams.get(gram, 0) + perplexity.PRIOR[n - 1] * p) / (context + perplexity.PRIOR[n - 1])
        total -= np.log(p)
    assert perplexity.perplexities([asked], ["x"], one)[0] == pytest.approx(np.exp(total / 4))
    assert perplexity.perplexities(["", "..."], ["x", "y"], one).tolist() == [1, 1]


def test_words_fold_case_and_digits_and_divide_chinese():
    def words(text):
        return perplexity.hashes([text])[0].tolist()

    assert words("Year 1999, AGAIN") == words("year 2024 again") and len(words("don't")) == 2
    assert len(words("人人生而自由")) == 6 and len(words("Größe ключ")) == 2 and words("ab") != words("ba")
    assert len(words("\ud800 a")) == 1


def test_training_does_not_depend_on_the_order_of_parts(trained, tmp_path):
    _, parts, (path,) = trained
    (other,) = perplexity.fit(parts[::-1], tmp_path, Data())
    assert path.name == "en.npz" and other.read_bytes() == path.read_bytes()


def test_the_sample_is_bounded_and_does_not_depend_on_the_parts(trained, tmp_path, monkeypatch):
    _, parts, _ = trained
    monkeypatch.setattr(perplexity, "SAMPLE", 250_000)
    made = [
        perplexity.fit(order, tmp_path / str(k), Data())
        for k, order in enumerate((parts, parts[::-1], parts[1:] + parts[:1]))
    ]
    assert made[0][0].read_bytes() == made[1][0].read_bytes() == made[2][0].read_bytes()
    with np.load(made[0][0], allow_pickle=False) as model:
        longest = max(len(perplexity.hashes([text])[0]) for text in corpus())
        assert 250_000 / 8 < model["words"].sum() < 250_000 / 4.5 + longest


def test_only_known_prose_with_enough_text_is_trained_on(trained, tmp_path):
    texts, parts, _ = trained
    for k, made in enumerate(
        (
            table(texts, domain="code"),
            table(texts, score=0.3),
            table(texts, code=""),
            table(texts[:5]),
            table(texts[:1] * 400),
        )
    ):
        pq.write_table(made, tmp_path / f"{k}.parquet")
        assert perplexity.fit([tmp_path / f"{k}.parquet"], tmp_path / "m", Data()) == []
    assert perplexity.fit(parts, tmp_path / "m", Data(perplexity_model="elsewhere")) == []


def test_the_band_drops_its_share_and_an_unknown_language_is_not_asked(trained):
    texts, _, (path,) = trained
    out = filters.apply(table(texts), Data(filters={"*": ["perplexity"]}, perplexity_band=(0.1, 0.9)), path.parent)
    rows = [{row["filter"]: row for row in item} for item in out["decisions"].to_pylist()]
    for name, share in (("perplexity_low", 0.1), ("perplexity_high", 0.1)):
        dropped = np.mean([row[name]["decision"] == "drop" for row in rows])
        assert dropped == pytest.approx(share, abs=0.01)
    open_band = filters.apply(
        table(texts[:2]), Data(filters={"*": ["perplexity"]}, perplexity_band=(0, 1)), path.parent
    )
    unknown = filters.apply(table(texts[:2], code="fr"), Data(), path.parent)
    other = filters.apply(table(texts[:2], domain="code"), Data(), path.parent)
    for made in (open_band, unknown, other):
        assert not [r for item in made["decisions"].to_pylist() for r in item if "perplexity" in r["filter"]]


def test_scores_are_the_same_in_any_batch(trained):
    texts, _, (path,) = trained
    whole = [value for value, _ in perplexity.score(table(texts[:7]), path.parent)]
    assert whole == [perplexity.score(table([text]), path.parent)[0][0] for text in texts[:7]]


def test_a_file_of_another_format_is_refused(tmp_path):
    np.savez(tmp_path / "en.npz", counts=np.zeros((2, 8), np.uint32), words=np.zeros(2), quantiles=np.zeros(3))
    with pytest.raises(ValueError, match="train it again"):
        perplexity.load(tmp_path, "en")
    assert perplexity.load(tmp_path, "de") is None and perplexity.load(Path(tmp_path), "../en") is None
