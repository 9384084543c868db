"""Personal data and secrets in a text: found by their published formats and check digits, replaced by `<kind>`.

A pattern is tried only where its hint occurs. What the format alone can't tell from a number or a name in code, a check
decides: Luhn, ISO 7064, the address registries, entropy. Nothing but counts leaves this module.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

PERSONAL = ("email", "ip_address", "iban", "payment_card", "phone")
SECRETS = ("private_key", "cloud_key", "access_token", "jwt", "password")
MASKS = tuple(f"<{kind}>" for kind in (*SECRETS, *PERSONAL))
# Length of an IBAN by country (SWIFT registry)
IBAN = re.findall(
    r"(\w\w)(\d\d)",
    "NO15 BE16 DK18 FI18 NL18 FO18 GL18 MK19 SI19 AT20 BA20 EE20 KZ20 LT20 LU20 XK20 CH21 HR21 LI21 LV21 BG22 "
    "BH22 DE22 GB22 IE22 ME22 RS22 GE22 AE23 IL23 AD24 CZ24 ES24 MD24 PK24 RO24 SA24 SE24 SK24 TN24 VG24 PT25 "
    "IS26 TR26 FR27 GR27 IT27 MC27 SM27 AL28 AZ28 CY28 DO28 HU28 LB28 PL28 BR29 PS29 QA29 UA29 JO30 KW30 MU30 "
    "MT31 SC31",
)
RESERVED = re.compile(r"(?:^|[@.])(?:example(?:\.\w+)?|test|invalid|localhost|local|internal)$", re.I)  # RFC 2606, 6762
TOP = re.compile(
    r"\.(?:[a-z]{2}|arpa|app|biz|cloud|com|coop|dev|edu|gov|info|int|mil|museum|name|net|online|org|pro|site|tech|xyz)$",
    re.I,
)


def _email(found: str) -> bool:
    return bool(TOP.search(found)) and not RESERVED.search(found) and not found.lower().startswith(("git@", "hg@"))


def _iban(found: str) -> bool:
    code = found.replace(" ", "")
    # the number, rotated by four, letters as 10 to 35, is 1 modulo 97        (ISO 13616, ISO 7064 MOD 97-10)
    return (code[:2], str(len(code))) in IBAN and int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def _luhn(found: str) -> bool:
    digits = [int(c) for c in found if c.isdecimal()][::-1]
    # every second digit from the right is doubled, and its digits added        (ISO/IEC 7812-1, annex B)
    return (sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0 and len(set(digits)) > 2


def _address(found: str) -> bool:
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    version = address.version == 4 and max(address.packed) < 20  # 4.11.0.2 is more often a release than a host
    return address.is_global and not address.is_multicast and not version


def _phone(found: str) -> bool:
    digits = sum(map(str.isdecimal, found))  # E.164: at most 15; with a country code, rarely below 9
    return 9 <= digits <= 15 and found.count(".") != 1 and (digits > 10 or not found[1:].isdecimal())


def _random(found: str) -> bool:
    """Digits and letters, 3 bits a character and more: a key, not a word, a path or a placeholder."""
    n = len(found)
    # H = -sum_c p(c) log2 p(c)        (Shannon 1948)
    entropy = -sum(k / n * math.log2(k / n) for k in Counter(found).values())
    return entropy >= 3 and any(map(str.isdecimal, found)) and any(map(str.isalpha, found))


class Finder(NamedTuple):
    """A finding is the first group of `pattern`, where `check` agrees."""

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    check: Callable[[str], bool] = bool


FINDERS = [Finder(kind, tuple(hints.split()), re.compile(pattern), *check) for kind, hints, pattern, *check in (
    ("private_key", "PRIVATE", r"(-----BEGIN [A-Z0-9 ]{0,20}PRIVATE KEY(?: BLOCK)?-----"
            r"[\w+/=\s\\,:\"'-]{64,12000}?-----END [A-Z0-9 ]{0,20}PRIVATE KEY(?: BLOCK)?-----)"),
    ("cloud_key", "AKIA ASIA ABIA ACCA", r"\b(A(?:KIA|SIA|BIA|CCA)[A-Z2-7]{16})\b",
            lambda s: "EXAMPLE" not in s),
    ("cloud_key", "AIza GOCSPX- ya29.", r"\b(AIza[\w-]{35}|GOCSPX-[\w-]{28}|ya29\.[\w-]{30,})(?![\w-])"),
    ("cloud_key", "AccountKey=", r"AccountKey=([A-Za-z0-9+/]{86}==)"),
    ("access_token", "ghp_ gho_ ghu_ ghs_ ghr_", r"\b(gh[pousr]_[A-Za-z0-9]{36,251})\b", _random),
    ("access_token", "github_pat_", r"\b(github_pat_\w{82})\b"),
    ("access_token", "glpat- gldt- glrt-", r"\b(gl(?:pat|dt|rt)-[\w-]{20,255})", _random),
    ("access_token", "xox", r"\b(xox[abeoprs]-(?:\d+-)[\w-]{10,200})", _random),
    ("access_token", "hooks.slack.com", r"hooks\.slack\.com/services/(T\w{8,12}/B\w{8,12}/\w{20,28})", _random),
    ("access_token", "k_live_ k_test_", r"\b([rs]k_(?:live|test)_[A-Za-z0-9]{16,128})\b", _random),
    ("access_token", "hf_ npm_", r"\b(hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36})\b", lambda s: len(set(s)) > 12),
    ("access_token", "T3BlbkFJ sk-ant-", r"\b(sk-[\w-]{16,120}T3BlbkFJ[\w-]{16,120}|sk-ant-[\w-]{80,120})"),
    ("access_token", "pypi-AgE dckr_pat_ hvs.", r"\b(pypi-AgE[\w-]{50,200}|"
            r"dckr_pat_[\w-]{27}|hvs\.[\w-]{24,120})"),
    ("access_token", "SG. dop_v1_ shpat_ dapi", r"\b(SG\.[\w-]{22}\.[\w-]{43}|dop_v1_[0-9a-f]{64}|"
            r"shpat_[0-9a-f]{32}|dapi[0-9a-f]{32})\b"),
    ("access_token", ":AA", r"\b(\d{8,10}:AA[\w-]{33})(?![\w-])"),
    ("jwt", "eyJ", r"\b(eyJ[\w-]{10,2000}\.eyJ[\w-]{10,8000}\.[\w-]{20,2000})"),  # RFC 7519: base64url of {"
    ("password", "://", r"://[\w.%-]{1,64}:([^\s:/@<>{}$\[\]\"']{6,128})@(?=\w)", _random),
    ("password", "passw passphrase secret token api_key apikey api-key access_key accesskey access-key",
            r"[pPsStTaA](?i:(?<=p)assw(?:or)?d|(?<=p)assphrase|(?<=s)ecret|(?<=t)oken|(?<=a)pi[_-]?key|"
            r"(?<=a)ccess[_-]?key)\w{0,24}[\"']?\s{0,4}(?::=|=>|[=:])\s{0,4}"
            r"[\"']([\w+/=.!@#%^&*~?-]{12,256})[\"']", _random),
    ("email", "@", r"([A-Za-z0-9_](?<![\w.+%/-].)[\w.+%-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,6}[A-Za-z]{2,12})"
            r"(?![\w(@-])", _email),
    ("ip_address", ".", r"(\d(?<![\w.=/+-].)(?<!ersion .)\d{0,2}(?:\.\d{1,3}){3})(?![\w-]|\.\w)", _address),
    ("ip_address", ":", r"([23](?<![\w:.].)[0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34})(?![\w:])", _address),  # 2000::/3
    ("iban", "", r"([A-Z](?<![\w-].)[A-Z]\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?)(?![\w-])", _iban),
    ("payment_card", "",
            r"([2-6](?<![\w.,+/(=\[-].)(?:(?:(?<=4)\d|(?<=5)[1-5]|(?<=2)[2-7]|(?<=6)5)\d\d|(?<=6)011)"
            r"([ -]?)\d{4}\2\d{4}\2\d{4}|3(?<![\w.,+/(=\[-].)[47]\d\d([ -]?)\d{6}\3\d{5})(?![\w.,/-]*\d)", _luhn),
    ("phone", "+",
            r"(\+(?<![\w+./)\]=-].)[1-9]\d{0,2}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\(?\d{2,4}\)?){1,5})(?![\w.-]*\d)", _phone),
)]  # fmt: skip


def scrub(text: str, personal: bool, secrets: bool) -> tuple[str, dict[str, int]]:
    """(masked text, number of findings of every kind asked for). Masking a masked text finds nothing."""
    counts = dict.fromkeys([*(SECRETS if secrets else ()), *(PERSONAL if personal else ())], 0)
    lower = text.lower() if secrets else ""
    for kind, hints, pattern, check in FINDERS:
        where = lower if kind == "password" else text
        if kind not in counts or (hints and not any(hint in where for hint in hints)):
            continue

        def masked(match: re.Match[str], kind: str = kind, check: Callable[[str], bool] = check) -> str:
            # what follows a placeholder at once was part of a longer word before: it stays, on every later pass too
            if not check(match[1]) or match.string[max(0, match.start(1) - 16) : match.start(1)].endswith(MASKS):
                return match[0]
            counts[kind] += 1
            start = match.start(1) - match.start()
            return f"{match[0][:start]}<{kind}>{match[0][start + len(match[1]) :]}"

        text = pattern.sub(masked, text)
    return text, counts
