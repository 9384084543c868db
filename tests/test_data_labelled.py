import ast

from data_corpus import module, profile, records

from stackpkg.data import labelled
from stackpkg.data.provenance import Record
from stackpkg.params import Auxiliary

TEXT = '''
import os

class A:
    async def method(self, x):
        """Read the thing slowly.

        Details follow.
        """
        y = x + 1
        if y: pass
        return y

    def __init__(self):
        """Make a thing now."""
        self.a = 1
        self.b = 2
        self.c = 3

def test_it():
    """Test the thing well."""
    a = 1
    b = 2
    assert a < b

def short(): return 1

def tricky():
    """One line here."""; z = 1
    z += 1
    z += 1
    return z

def plain(a):
    b = a
    c = b
    return c
'''


def test_functions_are_split_as_they_should_be():
    found = {f.prompt.split("(")[0].split()[-1]: f for f in labelled.functions(TEXT)}
    assert set(found) == {"method", "plain"}
    method = found["method"]
    assert method.query == "Read the thing slowly." and "Details" not in method.code and "Details" in method.prompt
    assert method.code.startswith("async def method(self, x):\n    y = x + 1\n") and method.body.endswith("return y\n")
    assert found["plain"].query == "" and ast.parse(found["plain"].code)


def test_modules_that_do_not_parse_give_nothing():
    assert labelled.functions("def broken(:\n") == [] and labelled.functions("x = '\x00'") == []


def test_pairs_keep_the_rules():
    made = records()
    held = {made[0].record_id, made[1].record_id}
    pairs = labelled.mine(made, held, profile().auxiliary, 8)
    assert len(pairs) == 60 and labelled.leakage(pairs) == 0
    assert len({pair["pair_key"] for pair in pairs}) == len({pair["query"] for pair in pairs}) == 60
    texts = {record.record_id: record.text for record in made}
    for pair in pairs:
        assert pair["query"] not in " ".join(pair["positive"].split()) and '"""' not in pair["positive"]
        assert len(pair["negatives"]) == 2 and pair["positive"] not in pair["negatives"]
        assert all(text.split("\n")[0] in texts[pair["record_id"]] for text in pair["negatives"])
        assert pair["chosen"] in texts[pair["record_id"]] and pair["chosen"] != pair["rejected"]
        assert pair["prompt"].startswith("def ") and pair["licence"] == "MIT"
    out = [pair for pair in pairs if pair["split"] == "held_out"]
    assert len(out) == 10 and {pair["record_id"] for pair in out} == held and all(pair["unseen"] for pair in out)


def test_order_of_the_records_is_no_matter():
    made = records()
    assert labelled.mine(made, set(), profile().auxiliary, 8) == labelled.mine(
        made[::-1], set(), profile().auxiliary, 8
    )


def test_copied_functions_count_once_and_small_modules_not_at_all():
    single = 'def f(a):\n    """Do one thing here."""\n    b = a\n    c = b\n    return c\n'
    made = [Record(f"folder:t/{k}.py", "code", "MIT", 0, text) for k, text in enumerate([module(1), module(1), single])]
    pairs = labelled.mine(made, set(), Auxiliary(), 8)
    assert len(pairs) == 5 and len({pair["record_id"] for pair in pairs}) == 1


def test_functions_that_share_a_body_are_no_negatives_of_each_other():
    twins = "".join(
        f'def {n}(a):\n    """Do one thing in {n}."""\n    b = a\n    c = b\n    return c\n\n' for n in "fgh"
    )
    other = "def k(a):\n    z = a + 1\n    y = z\n    return y\n"
    assert labelled.mine([Record("folder:t/1.py", "code", "MIT", 0, twins)], set(), Auxiliary(), 8) == []
    pairs = labelled.mine([Record("folder:t/1.py", "code", "MIT", 0, twins + other)], set(), Auxiliary(), 8)
    assert len(pairs) == 3 and {pair["rejected"] for pair in pairs} == {other.split(":\n", 1)[1]}


def test_leakage_is_seen():
    pairs = labelled.mine(records(), set(), profile().auxiliary, 8)
    pairs[-1]["negatives"][0] = pairs[0]["positive"]
    assert labelled.leakage(pairs) == 1
