"""Who may use the server: keys of tenants, read from a file.

A key's tenant is part of the salt of all that it asks for, so that tenants share nothing, and none
can find out by how fast it is answered what another has asked. What a client sends as `cache_salt`
divides its own tenant's cache further and reaches no other's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from jax_chunkattn.server.errors import ApiError

OBSERVER = "observer"
LEAST_KEY = 16  # characters
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


class KeysError(ValueError):
    """A file of keys that cannot be used."""


@dataclass(frozen=True)
class Tenant:
    """Attributes:
    name: empty where there are no keys.
    observes: may see the tree and the metrics, which are of all tenants.
    """

    name: str = ""
    observes: bool = False

    def salt(self, cache_salt: str | None) -> str:
        """What keeps its requests apart; a name has no zero byte, so no two pairs are alike."""
        own = cache_salt or ""
        return f"{self.name}\0{own}" if self.name else own


EVERYBODY = Tenant(observes=True)
"""Who asks where there are no keys."""


class Keys:
    """The tenants by their keys, of which only digests are kept.

    Args:
      tenants: by key.
    """

    def __init__(self, tenants: dict[str, Tenant]):
        self._digests = [(_digest(key), tenant) for key, tenant in tenants.items()]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Of a file with a line for each key: the tenant's name, the key, and `observer` if it may
        see the tree and the metrics. Lines that begin with # are passed over.

        Raises KeysError for a file that is not so, that others than its owner can read, or that has
        no key.
        """
        try:
            if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeysError(f"{path} can be read by others: chmod 600 {path}")
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeysError(f"{path} cannot be read ({error})") from error
        tenants: dict[str, Tenant] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            where = f"{path}:{number}"
            if len(words) not in (2, 3) or words[2:] not in ([], [OBSERVER]):
                raise KeysError(f"{where}: expected NAME KEY, or NAME KEY {OBSERVER}")
            name, key = words[:2]
            if not _NAME.fullmatch(name):
                raise KeysError(f"{where}: a name has letters, digits and ._- only, 64 at most")
            if len(key) < LEAST_KEY or not key.isascii():
                raise KeysError(f"{where}: a key has at least {LEAST_KEY} ASCII characters")
            if key in tenants:
                raise KeysError(f"{where}: this key stands above already")
            tenants[key] = Tenant(name, observes=len(words) == 3)
        if not tenants:
            raise KeysError(f"{path} has no key")
        return cls(tenants)

    def tenant_of(self, authorization: str | None) -> Tenant:
        """Whose key an `Authorization` header has.

        All keys are compared, each in a time that does not depend on how much of it is right.
        Raises ApiError when there is none, or a wrong one.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = None
        for digest, tenant in self._digests:
            if hmac.compare_digest(digest, given):
                found = tenant
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(
                401,
                "a valid key is needed, as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
