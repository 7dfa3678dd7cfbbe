"""Whom a certificate is about, and who signed it, as text: RFC 4514, spelt as GnuTLS and so nbdkit spell it.

From the bytes of the certificate, as Python's own account of it has lost what types values have and which names were
written together. Knows no TLS.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Names", "names_of"]

#: Types of attributes that have a name. Others are written as numbers, and their values in hexadecimal.
_TYPES = {
    "2.5.4.3": "CN",
    "2.5.4.4": "surName",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "street",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.12": "title",
    "2.5.4.13": "description",
    "2.5.4.15": "businessCategory",
    "2.5.4.17": "postalCode",
    "2.5.4.41": "name",
    "2.5.4.42": "givenName",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "EMAIL",
    "1.3.6.1.4.1.311.60.2.1.1": "jurisdictionOfIncorporationLocalityName",
    "1.3.6.1.4.1.311.60.2.1.2": "jurisdictionOfIncorporationStateOrProvinceName",
    "1.3.6.1.4.1.311.60.2.1.3": "jurisdictionOfIncorporationCountryName",
}

#: How values are encoded, by their tag.
_ENCODINGS = {
    0x0C: "utf-8",
    0x12: "ascii",  # NumericString
    0x13: "ascii",  # PrintableString
    0x14: "latin-1",  # TeletexString, as everybody takes it
    0x16: "ascii",  # IA5String
    0x1C: "utf-32-be",  # UniversalString
    0x1E: "utf-16-be",  # BMPString
}

#: In bytes; those that are in use have some ten.
_LONGEST_OID = 64

_VERSION = 0xA0
_ESCAPED = frozenset(',+"\\<>;')


class Names(NamedTuple):
    """The two names in a certificate."""

    subject: str
    issuer: str


def names_of(certificate: bytes) -> Names:
    """Return the names in a certificate, which is given in DER.

    Raises:
        ValueError: it is none.
    """
    (whole,) = _elements(certificate)
    signed, *_ = _elements(whole.content)
    # Serial number, algorithm, issuer, validity, subject.
    _, _, issuer, _, subject, *_ = (field for field in _elements(signed.content) if field.tag != _VERSION)
    return Names(_name(subject.content), _name(issuer.content))


def _name(content: bytes) -> str:
    """A name as text, in which the last part comes first."""
    parts = ["+".join(map(_attribute, _elements(part.content))) for part in _elements(content)]
    return ",".join(reversed(parts))


def _attribute(attribute: _Element) -> str:
    oid, value = _elements(attribute.content)
    number = _oid(oid.content)
    encoding = _ENCODINGS.get(value.tag)
    if number not in _TYPES or encoding is None:
        return f"{number}=#{value.whole.hex()}"
    return f"{_TYPES[number]}={_escaped(value.content.decode(encoding))}"


def _escaped(text: str) -> str:
    escaped = "".join(f"\\{c}" if c in _ESCAPED else "\\00" if c == "\0" else c for c in text)
    if escaped.endswith(" "):
        escaped = f"{escaped[:-1]}\\ "
    # What is one space only has been escaped just now.
    return f"\\{escaped}" if escaped.startswith((" ", "#")) else escaped


# --- DER ---


class _Element(NamedTuple):
    tag: int
    content: bytes
    whole: bytes


def _elements(data: bytes) -> Iterator[_Element]:
    """The elements that lie one after the other in `data`. Only what certificates have: tags and lengths are short."""
    begin = 0
    while begin < len(data):
        length, start = _length(data, begin)
        end = start + length
        if end > len(data):
            raise ValueError("an element is cut off")
        yield _Element(data[begin], data[start:end], data[begin:end])
        begin = end


def _length(data: bytes, begin: int) -> tuple[int, int]:
    """The length of the content of the element that begins there, and where that begins."""
    start = begin + 2
    first = data[begin + 1] if start <= len(data) else 0x80
    count = max(first - 0x80, 0)
    if first == 0x80 or start + count > len(data):
        raise ValueError("the length of an element is not there")
    return (int.from_bytes(data[start : start + count], "big") if count else first), start + count


def _oid(content: bytes) -> str:
    if len(content) > _LONGEST_OID:  # time grows with the square
        raise ValueError("the number of a type is too long")
    numbers = [0]
    for byte in content:
        numbers[-1] = numbers[-1] << 7 | byte & 0x7F
        if not byte & 0x80:
            numbers.append(0)
    both, *others = numbers[:-1]
    first = min(both // 40, 2)
    return ".".join(map(str, (first, both - 40 * first, *others)))
