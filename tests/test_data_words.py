"""Words of tokens, and how rare they are."""

from data_corpus import corpus

from stackpkg.data import tokenizer, words
from stackpkg.data.corpus import Corpus


def test_tokens_that_differ_in_case_or_a_space_are_one_word() -> None:
    model = tokenizer.train_tokenizer(["value value Value return", "value_value Value(value)"] * 50, 320)
    word, ids = words.numbered(model), model.get_vocab()
    assert word[ids["value"]] == word[ids["\u0120value"]] == word[ids["Value"]] > 0
    assert word[ids["value"]] != word[ids["\u0120return"]]
    assert {int(word[ids[token]]) for token in (*tokenizer.SPECIALS, "(", ",", "\u0120")} == {0}


def test_rare_words_weigh_more_and_punctuation_nothing() -> None:
    found = Corpus(corpus())
    model = tokenizer.of_shards(corpus())
    word, ids = words.numbered(model), model.get_vocab()
    rare = words.rarity(found, word)
    assert rare.shape == word.shape and rare.min() == 0 and (rare[word == 0] == 0).all()
    assert 0 < rare[ids["\u0120return"]] < rare[ids["Z"]], "a word of every function, and a letter of no document"
