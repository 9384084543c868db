"""What is found and what is left alone: every secret here is made up at random."""

import random
import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stackpkg.data.scrub import FINDERS, PERSONAL, SECRETS, scrub

RNG = random.Random(5)


def made(alphabet, n):
    """A random string with letters and digits where the alphabet has them."""
    return "".join(RNG.choice(alphabet) for _ in range(n - 4)) + alphabet[0] + alphabet[-1] + alphabet[0] + alphabet[-1]


MIX, HEX, LETTERS = string.ascii_letters + string.digits, "abcdef0123456789", string.ascii_letters
KEY = "\n".join(made(MIX, 64) for _ in range(5))
PRIVATE = "-----BEGIN {0}PRIVATE KEY-----\n{1}\n-----END {0}PRIVATE KEY-----"
FOUND = {
    "private_key": [PRIVATE.format(kind, KEY) for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED ")]
    + [PRIVATE.format("RSA ", f"Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,AB12\n\n{KEY}")],
    "cloud_key": [
        "AKIA" + made("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16), "ASIA" + made("QRSTUVWXYZ234567", 16),
        "AIza" + made(MIX, 35), "GOCSPX-" + made(MIX, 28),
        "ya29." + made(MIX, 60), "AccountKey=" + made(MIX, 86) + "==",
    ],
    "access_token": [
        *(f"gh{k}_{made(MIX, 36)}" for k in "pousr"), "github_pat_" + made(MIX, 82), "glpat-" + made(MIX, 20),
        f"xoxb-{made('123456789', 12)}-{made(MIX, 24)}", f"xoxp-{made('123456789', 12)}-{made(MIX, 24)}",
        f"https://hooks.slack.com/services/T{made('ABC123', 8)}/B{made('ABC123', 8)}/{made(MIX, 24)}",
        "sk_live_" + made(MIX, 24), "rk_test_" + made(MIX, 24), "hf_" + made(LETTERS, 34), "npm_" + made(MIX, 36),
        f"sk-proj-{made(MIX, 40)}T3BlbkFJ{made(MIX, 40)}", "sk-ant-" + made(MIX, 90),
        "pypi-AgEIcHlwaS5vcmc" + made(MIX, 60),
        "dckr_pat_" + made(MIX, 27), "hvs." + made(MIX, 40), f"SG.{made(MIX, 22)}.{made(MIX, 43)}",
        "dop_v1_" + made(HEX, 64), "shpat_" + made(HEX, 32), f"{made('123456789', 9)}:AA{made(MIX, 33)}",
    ],
    "jwt": [f"eyJ{made(MIX, 30)}.eyJ{made(MIX, 80)}.{made(MIX, 43)}"],
    "password": [
        'password = "hT7#kq2Lw9!z"', "API_KEY='9f8Ab7e6D5c4b3a2f1e0'", '"client_secret": "Zk3vN8pQ1xT6yB4m"',
        'token: "q1W2e3R4t5Y6u7I8"', "postgres://app:x9Kq2mW7vT@db.firm.de/main",
        'aws_access_key := "a8D7f6G5h4J3k2L1"',
    ],
    "email": ["anna.smith@firm.de", "<bob+list@mail.uni-bonn.de>", "x_y@some-host.co.uk", "mailto:sales@shop.com."],
    "phone": ["+49 30 901820 11", "+1 (415) 555 2671", "+14155552671", "+44 20 7946 0958", "tel:+33-1-42-68-53-00"],
    "ip_address": ["93.184.216.34", "host 8.8.4.144 answered",
                   "2606:2800:220:1:248:1893:25c8:1946", "[2a00:1450::200e]"],
    "iban": ["DE89370400440532013000", "DE89 3704 0044 0532 0130 00", "GB82 WEST 1234 5698 7654 32", "NO9386011117947"],
    "payment_card": ["4539 1488 0343 6467", "4539-1488-0343-6467", "card 5555341244441115",
                     "3782 822463 10005", "6011 0009 9013 9424"],
}  # fmt: skip
LEFT = [  # hashes, identifiers, versions; addresses of no person; numbers; names beside no secret
    "hf_" + "a" * 34,
    "sk_live_" + "x" * 24,
    *r"""sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
commit 82ca262f1d0b9c7e5a4e3d2c1b0a9f8e7d6c5b4a
550e8400-e29b-41d4-a716-446655440000
numpy==2.4.6
version 10.0.19.45
v1.2.3.4
1.3.6.1.4.1.311.21.20
section 4.2.1.3
integrity sha512-z9hWq1X0bDh4bVYqpxr2S5vQxw0nJm1s8hZ3u2vVqH8c7eV0nqk8m3Yt9o1bKpE4yL5sZ0wV7cQn2rA6jD3fGg==
git@github.com:org/repo.git
file@2x.png
y = w@x.reshape(3)
loss = a@b.transpose
@property
pkg@1.2.3
user@example.com
127.0.0.1
192.168.1.77
10.1.2.3
203.0.113.9
0.0.0.0
255.255.255.255
::1
fe80::1
2001:db8::1
std::vector::at
dead::beef
a::b
2023:11:22 10:33:22
999.300.1.2
4539 1488 0343 6466
4539148803436468
1700000000000000
0.4539148803436467
3.141592653589793
+12345678
x +1415555267
+0200
+1.23456789012
a+4915112345678
2024-01-01 +01:00
DE89370400440532013001
AB12CDEF34567890ABCD
1111 1111 1111 1111
password = "password123"
password = getpass("Password: ")
token = "<your token here>"
secret = os.environ["SECRET_TOKEN_1"]
api_key="YOUR_API_KEY_HERE"
tokenizer = "bert-base-uncased"
token_type = "Bearer"
AKIAIOSFODNN7EXAMPLE
ghp_short
-----BEGIN PRIVATE KEY-----
PREFIX = "xoxb-"
eyJhbGciOiJIUzI1NiJ9
http://user:pass@host/
postgres://user:${PASSWORD_1}@db/x""".splitlines(),
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_each_kind_is_found_once_and_replaced(kind, text):
    masked, counts = scrub(f"before {text} after", True, True)
    assert counts == dict.fromkeys([*SECRETS, *PERSONAL], 0) | {kind: 1}, masked
    assert f"<{kind}>" in masked and masked.startswith("before ") and masked.endswith(" after")
    again, none = scrub(masked, True, True)
    assert again == masked and not any(none.values())


def test_every_pattern_has_a_text_that_shows_it():
    shown = " ".join(text for texts in FOUND.values() for text in texts)
    assert not [finder for finder in FINDERS if not any(finder.check(m[1]) for m in finder.pattern.finditer(shown))]
    assert {finder.kind for finder in FINDERS} == set(FOUND) == {*SECRETS, *PERSONAL}


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_it_is_left_alone(text):
    masked, counts = scrub(f"before {text} after", True, True)
    assert masked == f"before {text} after", counts


def test_only_what_is_asked_for_is_looked_at():
    text = f"{FOUND['email'][0]} {FOUND['jwt'][0]}"
    assert scrub(text, False, False) == (text, {})
    assert "@" in scrub(text, False, True)[0] and "eyJ" in scrub(text, True, False)[0]


PIECES = [text for texts in FOUND.values() for text in texts] + LEFT


@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(PIECES)), max_size=8), st.sampled_from(["", " ", "\n"]))
@example(["+1000000 00", "+1000000 00"], "")
def test_masked_text_is_found_clean_whatever_surrounds_it(pieces, between):
    masked, counts = scrub(between.join(pieces), True, True)
    again, left = scrub(masked, True, True)
    assert sum(masked.count(f"<{kind}>") for kind in counts) >= sum(counts.values())
    assert again == masked and not any(left.values())


@pytest.mark.parametrize(
    "unit", ["a", "1", "1.", "a@", "+1 ", "AB12", "= ", "eyJ", "://a:", "-----BEGIN PRIVATE KEY-----", "token = '"]
)
def test_no_text_takes_more_than_linear_time(unit):
    times = []
    for n in (20_000, 80_000):
        text, start = (unit * n)[:n], time.process_time()
        scrub(text, True, True)
        times.append(time.process_time() - start)
    assert times[1] < 12 * times[0] + 0.2, times
