"""Where personal data and secrets stand in a text.

Each finder gives spans. It takes time linear in the text, whatever that holds: a match is tried
only at places that a plain search finds or a bounded expression begins at, and what repeats never
overlaps itself. In texts here an escaped quote is one of `QUOTES`, by how deep the string is
that it is in, so that `"` is always one of the outermost JSON's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import Final

QUOTES: Final = "\x02\x03\x04\x05"
Span = tuple[int, int]
Finder = Callable[[str], Iterable[Span]]

_QUOTES = "[\"'\x02-\x05]"
_GAP = "[ \u00a0\u202f]"
_SEPARATOR = "[ \u00a0\u202f./()\u2010\u2011\u2013-]"


def _any_of(words: Iterable[str]) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


# --- email --------------------------------------------------------------------------------------

_DOMAIN = re.compile(r"[\w-]{1,63}+(?:\.[\w-]{1,63}+)++")
_LOCAL_BACKWARDS = re.compile(r"(?:[\w.!#$%&*+^~-]|'(?=\w)){1,128}+")
_SCALED_IMAGE = re.compile(r"[1-9]x\.\w{3,4}")


def emails(text: str) -> Generator[Span]:
    """Addresses, also with the at sign as `%40`."""
    for sign in ("@", "%40"):
        at = text.find(sign)
        while at >= 0:
            span = _email_at(text, at, at + len(sign))
            if span:
                yield span
            at = text.find(sign, at + len(sign))


def _email_at(text: str, at: int, after: int) -> Span | None:
    domain = _DOMAIN.match(text, after)
    if domain is None or not domain[0].rpartition(".")[2][:1].isalpha():
        return None  # `package@1.2.3` is a version
    local = _LOCAL_BACKWARDS.match(text[max(0, at - 128) : at][::-1])
    if local is None or _SCALED_IMAGE.fullmatch(domain[0]):
        return None
    return at - local.end(), domain.end()


# --- phone --------------------------------------------------------------------------------------

_BEFORE = r"(?<![\w.,+-])"
_PHONES = (
    # +49 (0)171 1234567, 0049 171 1234567
    re.compile(
        rf"(?:(?<![\w+])\+|{_BEFORE}00)\(?[1-9](?:{_SEPARATOR}{{0,3}}+[0-9]){{7,15}}(?![0-9])"
    ),
    # 415-555-2671, (415) 555-2671, 1-415-555-2671
    re.compile(
        rf"{_BEFORE}(?:1[ .-])?(?:\([2-9][0-9]{{2}}\){_GAP}?|[2-9][0-9]{{2}}[ .-])"
        r"[2-9][0-9]{2}[ .-][0-9]{4}(?![\w]|[.-][0-9])"
    ),
    # 030 1234567, 06 12 34 56 78, (0171) 123-4567
    re.compile(
        rf"{_BEFORE}(?:\((?=0[0-9]{{1,5}}\)))?0[1-9](?:{_SEPARATOR}{{0,2}}+[0-9]){{7,10}}(?![\w]|[.-][0-9])"
    ),
    # (11) 91234-5678
    re.compile(
        rf"{_BEFORE}\([1-9][0-9]{{1,3}}\){_GAP}?[0-9]{{3,5}}[ -][0-9]{{3,4}}(?![\w]|[.-][0-9])"
    ),
)
_MOBILE = re.compile(r"07[0-9]{9}|01[567][0-9]{8,9}|0[67][0-9]{8}")
_DATE = re.compile(r"[0-9]{2}([./-])[0-9]{2}\1(?:19|20)[0-9]{2}(?![0-9])")
_NUMBER_ENDS = " \u00a0\u202f./()\u2010\u2011\u2013-"
_PHONE_WORDS = ("phone", "mobile", "telefon", "msisdn", "whatsapp")
_SHORT_PHONE_WORDS = ("tel", "fax", "cell", "handy")
_NUMBER_AFTER = (
    rf"[a-z]{{0,3}}(?:[ _-]?(?:number|num|nr|no)\b)?\.?{_QUOTES}?"
    rf"\s{{0,3}}(?:[:=]|is\b)?\s{{0,3}}{_QUOTES}?"
    rf"(\+?\(?[0-9](?:{_SEPARATOR}{{0,2}}+[0-9]){{6,14}})(?![0-9]|\.[0-9])"
)
_AFTER_PHONE_WORD = re.compile(_any_of(_PHONE_WORDS) + _NUMBER_AFTER)
_AFTER_SHORT_WORD = re.compile("(?<![a-z])" + _any_of(_SHORT_PHONE_WORDS) + _NUMBER_AFTER)


def phones(text: str) -> Generator[Span]:
    """Numbers in international or a common national form, and plain ones after a word for them."""
    if _may_have_digits(text):
        yield from _in_runs(text, _PHONES, _is_phone)
        lower = _lowered(text)
        yield from _at_words(lower, _PHONE_WORDS, _AFTER_PHONE_WORD)
        yield from _at_words(lower, _SHORT_PHONE_WORDS, _AFTER_SHORT_WORD)


def _is_phone(found: str) -> bool:
    digits = sum(character.isdigit() for character in found)
    if found[0] == "+":
        # One point and nothing else makes a number with a fraction.
        plain = len(found) - digits == 2 and "." in found
        return not plain
    if not found.startswith("0"):
        return "(" in found or not _DATE.match(found)
    if found.startswith("00"):
        return digits >= 12 or len(found) > digits
    if len(found) == digits:
        return _MOBILE.fullmatch(found) is not None
    return not _DATE.match(found) and not (len(found) == digits + 1 and "." in found)


# --- card ---------------------------------------------------------------------------------------

_CARD = re.compile(
    r"(?<![0-9A-Za-z])(?<![0-9][.,])(?:[3-6][0-9]{12,18}|2[2-7][0-9]{14}"
    "|(?:[4-6][0-9]{3}|35[0-9]{2}|2[2-7][0-9]{2})([ .\u00a0-])[0-9]{4}\\1[0-9]{4}\\1[0-9]{1,7}"
    "|3[0-9]{3}([ .\u00a0-])[0-9]{6}\\2[0-9]{4,5}"
    r")(?![0-9A-Za-z]|\.[0-9])"
)


def cards(text: str) -> Generator[Span]:
    """Numbers of payment cards: an issuer's first digits, a usual grouping, a right check digit."""
    if _may_have_digits(text):
        yield from _in_runs(text, (_CARD,), _is_card)


def _is_card(found: str) -> bool:
    digits = [int(character) for character in found if character.isdigit()]
    if not 13 <= len(digits) <= 19:
        return False
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + doubled) % 10 == 0 and len(set(digits)) > 1


# --- iban ---------------------------------------------------------------------------------------

_IBAN_START = re.compile(  # begins with what is rare, a digit
    r"[0-9](?<=[A-Za-z]{2}[0-9])(?<![0-9A-Za-z][A-Za-z]{2}[0-9])[0-9]"
    r"(?=[ \u00a0-]?[0-9A-Za-z]{3})"
)
_IBAN_LENGTHS = {
    length: codes.split()
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK", 21: "CH CR HR LI LV",
        22: "BG BH DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
}  # fmt: skip
_IBANS = {
    code: re.compile(
        rf"[A-Za-z]{{2}}[0-9]{{2}}(?:[ \u00a0-]?[0-9A-Za-z]){{{length - 4}}}(?![0-9A-Za-z])"
    )
    for length, codes in _IBAN_LENGTHS.items()
    for code in codes
}


def ibans(text: str) -> Generator[Span]:
    """Account numbers whose country, length and check digits are right."""
    if not _may_have_digits(text):
        return
    for digits in _IBAN_START.finditer(text):
        start = digits.start() - 2
        pattern = _IBANS.get(text[start : start + 2].upper())
        found = pattern.match(text, start) if pattern else None
        if found and _is_iban(found[0]):
            yield found.span()


def _is_iban(found: str) -> bool:
    account = "".join(character for character in found if character.isalnum())
    number = "".join(str(int(character, 36)) for character in account[4:] + account[:4])
    return int(number) % 97 == 1


# --- ip -----------------------------------------------------------------------------------------

_BYTE = "(?:25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})"
_IP4 = re.compile(rf"(?<![\w.-]){_BYTE}(?:\.{_BYTE}){{3}}(?![\w-]|\.[0-9])")
_IP6 = re.compile(
    r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{2,39}+"
    r"(?:(?<=:)[0-9.]{7,15}+|(?<=[0-9])\.[0-9.]{5,13}+)?(?!\w)"
)
_POINTS = re.compile(r"\.[0-9]{1,3}\.[0-9]")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_VERSION_BEFORE = re.compile(
    r"(?i)(?:version|release|ver|build|v)[\"'\x02-\x05]?\.?[ :=]{0,3}[\"'\x02-\x05]?$"
)


def addresses(text: str) -> Generator[Span]:
    """IP addresses of both kinds."""
    if _POINTS.search(text):
        for found in _IP4.finditer(text):
            before = text[max(0, found.start() - 14) : found.start()]
            if not _VERSION_BEFORE.search(before):
                yield found.span()
    if _COLONS.search(text):
        for found in _IP6.finditer(text):
            end = found.end() - (len(found[0]) - len(found[0].rstrip(".")))
            if text[found.start() : end].endswith(":") and not text[:end].endswith("::"):
                end -= 1
            if _is_ip6(text[found.start() : end]):
                yield found.start(), end


def _is_ip6(found: str) -> bool:
    head, shortened, tail = found.partition("::")
    groups = [group for part in (head, tail) if part for group in part.split(":")]
    count = len(groups)
    if groups and "." in groups[-1]:
        if not _IP4.fullmatch(groups.pop()):
            return False
        count += 1
    if not all(0 < len(group) <= 4 and group.isalnum() for group in groups):
        return False
    # `a::b` is more often a name in a program than an address.
    return any(map(str.isdigit, found)) and (count < 8 if shortened else count == 8)


# --- secret -------------------------------------------------------------------------------------

_TOKENS = {
    "sw_": r"(?<![A-Za-z0-9])sw_[A-Za-z0-9_-]{12,}+",
    "sk-": r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}+",
    **dict.fromkeys(
        ("AKIA", "ASIA", "ABIA", "ACCA", "AROA", "AIDA"), r"A[A-Z]{3}[A-Z0-9]{16}(?!\w)"
    ),
    **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[a-z]_[A-Za-z0-9]{20,}+"),
    "github_pat_": r"github_pat_[A-Za-z0-9_]{20,}+",
    "glpat-": r"glpat-[A-Za-z0-9_.-]{16,}+",
    "hf_": r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{24,}+",
    "AIza": r"AIza[A-Za-z0-9_-]{30,}+",
    "ya29.": r"ya29\.[A-Za-z0-9_.-]{16,}+",
    "GOCSPX-": r"GOCSPX-[A-Za-z0-9_-]{16,}+",
    "xox": r"xox[a-z]-[A-Za-z0-9-]{10,}+",
    "xapp-": r"xapp-[A-Za-z0-9-]{10,}+",
    "hooks.slack.com/": r"hooks\.slack\.com/[a-z]{1,12}/[A-Za-z0-9/]{16,}+",
    "_live_": r"_live_[A-Za-z0-9]{16,}+",
    "_test_": r"_test_[A-Za-z0-9]{16,}+",
    "eyJ": r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{12,}+(?:\.[A-Za-z0-9_-]*+){1,4}+",
    "-----BEGIN": (
        r"-----BEGIN[A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----"
        r"[^\"]*?(?:-----END[A-Z0-9 ]{1,60}-----|(?=\")|\Z)"
    ),
}  # fmt: skip
_PREFIXED = {prefix: re.compile(f"({pattern})") for prefix, pattern in _TOKENS.items()}
_SECRET_WORDS = (
    "password", "passwd", "passphrase", "passcode", "pwd", "secret", "credential",
    "apikey", "api_key", "api-key", "access_key", "accesskey", "access-key",
    "privatekey", "private_key", "private-key",
)  # fmt: skip
_TOKEN_WORDS = tuple(
    f"{what}{joint}token"
    for what in ("access", "auth", "refresh", "id", "bearer", "api", "session", "security")
    for joint in ("_", "-", "")
)
_VALUE = (
    rf"{_QUOTES}?\s{{0,3}}(?:=>|:=|=|:)\s{{0,3}}"
    r"(?:\"([^\"]*+)|\x02([^\"\x02]*+)|\x03([^\"\x02\x03]*+)|\x04([^\"\x02-\x04]*+)"
    r"|\x05([^\"\x02-\x05]*+)|'([^\"\x02-\x05']*+)|([^\s\"\x02-\x05',;&<>(){}\[\]]{4,}+))"
)
_AFTER_SECRET_WORD = re.compile(
    _any_of(_SECRET_WORDS) + r"(?:[_-]?(?:key|value|[0-9]{1,3}))?s?" + _VALUE
)
_AFTER_TOKEN_WORD = re.compile(_any_of(_TOKEN_WORDS) + _VALUE)
_AUTHORISED = re.compile(r"(?:bearer|basic)\s{1,3}([a-z0-9._~+/=-]{12,}+)")
_IN_URL = re.compile(r"://[^\s\"\x02-\x05/:@]{0,128}:([^\s\"\x02-\x05/@]{1,256})@")
_NAMED = (
    (_SECRET_WORDS, _AFTER_SECRET_WORD),
    (_TOKEN_WORDS, _AFTER_TOKEN_WORD),
    (("bearer", "basic"), _AUTHORISED),
)
_ANY_NAME = re.compile(r"pass|pwd|secret|credential|key|token[^s]|bearer|basic")
_NO_VALUES = frozenset({"", "null", "none", "true", "false"})


def secrets(text: str) -> Generator[Span]:
    """Keys of well-known kinds, private keys, and what stands where a password does."""
    for prefix in [prefix for prefix in _PREFIXED if prefix in text]:
        yield from _at_each(text, prefix, _PREFIXED[prefix])
    lower = _lowered(text)
    for words, pattern in _NAMED if _ANY_NAME.search(lower) else ():
        for start, end in _at_words(lower, words, pattern):
            value = lower[start:end]
            if value not in _NO_VALUES and not value.startswith("["):
                yield start, end
    if "://" in text:
        yield from _at_each(text, "://", _IN_URL)


# --- common -------------------------------------------------------------------------------------

_DIGITS = re.compile(r"[0-9][^A-Za-z\"]{6}")

_RUN = re.compile("[+(0-9][+0-9 \u00a0\u202f./()\u2010\u2011\u2013-]{6,}+")


def _may_have_digits(text: str) -> bool:
    """Whether there are as many digits together as the shortest number has."""
    return _DIGITS.search(text) is not None


def _in_runs(
    text: str, patterns: Iterable[re.Pattern[str]], holds: Callable[[str], bool]
) -> Generator[Span]:
    """The matches that hold, in what consists of digits and what may stand between them."""
    for run in _RUN.finditer(text):
        end = run.end() + 2  # a pattern looks at what follows
        for pattern in patterns:
            found = pattern.search(text, run.start(), end)
            while found:
                held = holds(found[0])
                if held:
                    yield found.span()
                # One that doesn't hold may hide another that begins inside it.
                at = found.end() if held else found.start() + 1
                found = pattern.search(text, at, end)


def _at_words(lower: str, words: Iterable[str], pattern: re.Pattern[str]) -> Generator[Span]:
    for word in [word for word in words if word in lower]:
        yield from _at_each(lower, word, pattern)


def _at_each(text: str, word: str, pattern: re.Pattern[str]) -> Generator[Span]:
    """What the pattern's group holds at each place where the word is, which it begins with."""
    at = text.find(word)
    while at >= 0:
        found = pattern.match(text, at)
        at += len(word)
        if found:
            span = found.span(found.lastindex or 0)
            yield span
            at = max(at, span[1])
        at = text.find(word, at)


def _lowered(text: str) -> str:
    """In lower case, each character where it was."""
    lower = text.lower()
    return lower if len(lower) == len(text) else text.replace("\u0130", "i").lower()


FINDERS: Final[dict[str, Finder]] = {
    "secret": secrets,
    "email": emails,
    "iban": ibans,
    "card": cards,
    "phone": phones,
    "ip": addresses,
}
"""By name of the pattern, those first that say most of what they found."""
