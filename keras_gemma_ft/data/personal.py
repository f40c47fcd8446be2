"""What looks like personal data in a text: a warning to look there, neither proof nor guarantee."""

from __future__ import annotations

import re
from collections.abc import Callable

KINDS = ("email", "phone", "card", "IBAN", "SSN")

# Every repetition is bounded: a pattern that is not takes hours on ten megabytes of one letter.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_CARD = re.compile(r"(?<!\d)(?<!\d[.,-])[2-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\d.,-]?\d)")
_AMEX = re.compile(r"(?<!\d)(?<!\d[.,-])3[47]\d{2}[ -]\d{6}[ -]\d{5}(?!\d)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_SSN = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_PHONE = re.compile(
    r"(?<![\w+])(?<!\d[.,-])(?:"
    r"\+\d{1,3}(?:[ .-]?(?:\(\d{1,4}\)|\d{1,4})){2,5}"  # +49 (30) 123 4567
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}"  # (212) 555-0123
    r"|\d{3}([.-])\d{3}\1\d{4}"  # 212-555-0123
    r")(?![\d-]|[.,]\d)"
)


def personal(text: str) -> dict[str, list[str]]:
    """Matches by kind (see `KINDS`), in the order of the text; kinds without any are left out."""
    found: dict[str, list[str]] = {}
    if "@" in text:
        _add(found, "email", _EMAIL, text)
    if _FOUR_DIGITS.search(text):
        _add(found, "card", _CARD, text, _is_card)
        _add(found, "card", _AMEX, text, _is_card)
        _add(found, "IBAN", _IBAN, text, _is_iban)
        _add(found, "SSN", _SSN, text)
        _add(found, "phone", _PHONE, text, lambda match: 8 <= len(_digits(match)) <= 15)
    return found


def masked(match: str) -> str:
    """The match with its middle hidden: fit for a report that others read."""
    shown = 2 if len(match) > 6 else 1
    return f"{match[:shown]}{'•' * min(len(match) - 2 * shown, 8)}{match[-shown:]}"


_FOUR_DIGITS = re.compile(r"\d{4}|\d{2} ?[A-Z0-9]{4}")


def _add(
    found: dict[str, list[str]],
    kind: str,
    pattern: re.Pattern[str],
    text: str,
    holds: Callable[[str], bool] = lambda match: True,
) -> None:
    matches = [match[0] for match in pattern.finditer(text) if holds(match[0])]
    if matches:
        found.setdefault(kind, []).extend(matches)


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _is_card(match: str) -> bool:
    """Luhn's check digit (ISO/IEC 7812-1), for the 13 to 19 digits of card numbers."""
    digits = [int(digit) for digit in reversed(_digits(match))]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(match: str) -> bool:
    """The check digits of ISO 13616, for the 15 to 34 characters of account numbers."""
    account = match.replace(" ", "")
    rotated = account[4:] + account[:4]
    return 15 <= len(account) <= 34 and int("".join(str(int(c, 36)) for c in rotated)) % 97 == 1
