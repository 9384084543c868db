"""Which word a token is of, and how rare it is: what embeddings of texts begin with."""

import re

import numpy as np
from tokenizers import Tokenizer

from stackpkg.data import tokenizer
from stackpkg.data.corpus import Corpus

DOCUMENTS, PIECE = 10_000, 64  # that are counted, tokens


def numbered(model: Tokenizer) -> np.ndarray:
    """int64 [vocab]: number of the word of each token, its letters and digits in lower case, so that a name and a
    sentence have the same words; 0 for a token without any, and for the special ones.
    """
    special, found = {*tokenizer.specials(model).values()}, {"": 0}
    texts = ("" if k in special else model.decode([k]) for k in range(model.get_vocab_size()))
    return np.array([found.setdefault("".join(re.findall(r"[^\W_]+", text.lower())), len(found)) for text in texts])


def rarity(corpus: Corpus, word: np.ndarray) -> np.ndarray:
    """float32 [vocab], at least 0: inverse document frequency of each token's word in the pieces, of `PIECE` tokens, of
    `DOCUMENTS` documents of training text, spread evenly; 0 for word 0. `word` as from `numbered`.
    """
    train = np.flatnonzero(corpus.split == "train")
    chosen = train[np.linspace(0, len(train) - 1, min(len(train), DOCUMENTS)).astype(int)]
    within, pieces = np.zeros(word.max() + 1), 0
    for document in chosen:
        found = word[corpus.read(int(document), 0, int(corpus.tokens[document]))]
        for begin in range(0, len(found), PIECE):
            within[np.unique(found[begin : begin + PIECE])] += 1
            pieces += 1
    # idf_w = log( (N + 1) / (n_w + 1) )   (Sparck Jones 1972; 1 for words that no piece has)
    rare = np.log((pieces + 1) / (within + 1))
    rare[0] = 0
    return rare[word].astype(np.float32)
