"""What a request may call an adapter: a name, and perhaps which version of it. Knows no files and no catalogue."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from gralora_runtime.errors import InvalidRequestError

MIN_DIGEST_DIGITS = 12  # of a prefix: 48 bits tell a thousand versions apart, and nobody types fewer by mistake

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ONE_PART = re.compile(_PART)
_REVISION = re.compile(rf"@(?!\d{{1,9}}\Z){_PART}\Z")  # a few digits alone are a version's number
_NAME = re.compile(rf"{_PART}(?:/{_PART})?(?:@(?!\d{{1,9}}\Z){_PART})?")
_NAME_RULE = (
    "must be 1 to 128 letters, digits, '.', '_' or '-' that begin with a letter or a digit; "
    "an organisation and '/' may stand before it, '@' and a revision behind"
)
_VERSION = re.compile(r"@(\d{1,9})\Z")
_DIGEST = re.compile(r"@sha256:([0-9a-f]*)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a request asks for: the version that is promoted, one by its number, or one by its content."""

    name: str
    number: int | None = None
    digest: str = ""  # the first 12 digits or more of the content's SHA-256

    @property
    def is_exact(self) -> bool:
        return self.number is not None or self.digest != ""


def is_part(text: str) -> bool:
    """A name without an organisation and a revision: what one directory may be called."""
    return _ONE_PART.fullmatch(text) is not None


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def check_name(field: str, name: str) -> None:
    """Names become path components, metric labels and log fields, so nothing else gets through."""
    if not is_name(name):
        raise InvalidRequestError(field, name, _NAME_RULE)


def parse_reference(field: str, text: str) -> Reference:
    """`name`, `name@3` or `name@sha256:0123456789ab`; the name itself may be `org/name@revision`."""
    if found := _DIGEST.search(text):
        if not MIN_DIGEST_DIGITS <= len(found[1]) <= 64:
            raise InvalidRequestError(field, text, f"a digest has {MIN_DIGEST_DIGITS} to 64 hexadecimal digits")
        reference = Reference(name=text[: found.start()], digest=found[1])
    elif found := _VERSION.search(text):
        reference = Reference(name=text[: found.start()], number=int(found[1]))
    else:
        reference = Reference(name=text)
    check_name(field, reference.name)
    return reference


def version_of(name: str, version: str) -> Reference:
    """One version of a name that was checked: "3", or "sha256:0123456789ab"."""
    reference = parse_reference("version", f"{name}@{version}")
    if not reference.is_exact:
        rule = f"must be a version's number, or 'sha256:' and {MIN_DIGEST_DIGITS} digits or more"
        raise InvalidRequestError("version", version, rule)
    return reference


def split_revision(name: str) -> tuple[str, str]:
    """`org/name` and the revision behind it, "" if there is none."""
    found = _REVISION.search(name)
    return (name[: found.start()], found[0][1:]) if found else (name, "")


def numbered(name: str, number: int) -> str:
    """How logs, metrics and lists call one version."""
    return f"{name}@{number}"


def summed(parts: Iterable[tuple[str, float]]) -> str:
    """How a mix is called: "pirate*0.7+poet". No adapter can have that name."""
    return "+".join(name if weight == 1 else f"{name}*{_shortest(weight)}" for name, weight in parts)


def unweighted(label: str) -> str:
    """The versions of a mix alone, "pirate@3+poet@1": anybody can think of another weight. Others stay as they are."""
    return "+".join(dict.fromkeys(part.partition("*")[0] for part in label.split("+")))


def account_of(label: str) -> str:
    """Whose use it counts as that this served: a name without its version, "pirate+poet" for a mix."""
    return "+".join(dict.fromkeys(part.rpartition("@")[0] or part for part in unweighted(label).split("+")))


def is_mix(label: str) -> bool:
    return "+" in label or "*" in label


def as_float32(weight: float) -> float:
    """The nearest that it can be on a device."""
    nearest: float = struct.unpack("f", struct.pack("f", weight))[0]
    return nearest


def _shortest(weight: float) -> str:
    """As few digits as tell it from every other float32, of which none needs more than nine."""
    shorter = (float(f"{weight:.{digits}g}") for digits in range(1, 10))
    told = next(number for number in shorter if as_float32(number) == as_float32(weight))
    return repr(told).removesuffix(".0")
