"""Keys say who may ask, and keep tenants apart."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest

from jax_chunkattn.server import tenants
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.serving import Serving
from jax_chunkattn.server.tenants import EVERYBODY, Keys, KeysError, Tenant
from tests.jax_chunkattn.server.endpoints import Running, running

ANN, BEN, OPS = "ann-key-0123456789", "ben-key-0123456789", "ops-key-0123456789"


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    text = f"# who may ask\n\nann {ANN}\nben {BEN}\nops {OPS} observer\n"
    keys = Keys.read(keys_file(tmp_path_factory.mktemp("keys"), text))
    with running(keys=keys) as found:
        yield found


@pytest.mark.parametrize("path", ["/v1/models", "/tree", "/metrics", "/v1/models/tiny"])
def test_nothing_is_told_without_a_key(keyed: Running, path: str):
    for headers in ({}, {"Authorization": ANN}, {"Authorization": f"Basic {ANN}"}):
        reply = keyed.get(path, **headers)
        assert (reply.status, reply.value["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert keyed.get(path, key=f"{ANN}x").status == 401
    assert keyed.get(path, key="\xff").status == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/openapi.json"])
def test_what_tells_nothing_of_tenants_is_open(keyed: Running, path: str):
    assert keyed.get(path).status == 200


def test_what_all_do_is_for_observers(keyed: Running):
    for path in ("/tree", "/metrics"):
        assert keyed.get(path, key=ANN).status == 403
        assert keyed.get(path, key=OPS).status == 200


def test_a_body_is_not_read_of_who_has_no_key(keyed: Running):
    assert keyed.complete("a").status == 401
    assert keyed.post("/v1/completions", b"{", key=ANN).status == 400


def test_tenants_share_nothing_and_none_can_choose_anothers_salt(keyed: Running):
    prompt = list(range(100, 148))

    def cached(key: str, **fields: str) -> int:
        usage = keyed.complete(prompt, key, max_tokens=1, **fields).value["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(ANN) == 0
    assert cached(ANN) == 47
    assert cached(BEN) == 0
    assert cached(BEN, cache_salt="own") == 0
    assert cached(BEN, cache_salt="own") == 47
    for salt in ("", "ann", "ann\0", "ann\0own", "\0"):
        before = keyed.engine.stats.prompts.hit
        assert cached(OPS, cache_salt=salt) == 0, salt
        assert keyed.engine.stats.prompts.hit == before


def test_no_two_pairs_of_tenant_and_salt_are_alike():
    names, salts = ("a", "ab", "b"), (None, "", "a", "b", "\0", "a\0b", "\0a")
    made = {Tenant(name).salt(salt) for name in names for salt in salts}
    assert len(made) == len(names) * (len(salts) - 1)  # none is the empty one
    assert EVERYBODY.salt("x") == "x"


def test_every_key_is_compared_and_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(
        tenants.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b)
    )
    keys = Keys({ANN: Tenant("ann"), BEN: Tenant("ben")})
    assert keys.tenant_of(f"Bearer {ANN}").name == "ann"
    assert keys.tenant_of(f"bearer  {BEN} ").name == "ben"
    with pytest.raises(ApiError):
        keys.tenant_of("Bearer ")
    assert len(compared) == 6
    assert {len(one) for pair in compared for one in pair} == {32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("ann\n", ":1: expected NAME KEY"),
        (f"# x\nann {ANN} admin\n", ":2: expected NAME KEY"),
        ("ann short\n", "at least 16"),
        ("ann " + "ä" * 20, "ASCII"),
        (f"a/b {ANN}", "letters, digits"),
        (f"ann {ANN}\nben {ANN}\n", ":2: this key stands above"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(KeysError, match=message):
        Keys.read(keys_file(tmp_path, text))


def test_a_file_that_others_can_read_is_refused(tmp_path: Path):
    with pytest.raises(KeysError, match="can be read by others: chmod 600"):
        Keys.read(keys_file(tmp_path, f"ann {ANN}\n", 0o644))
    with pytest.raises(KeysError, match="cannot be read"):
        Keys.read(tmp_path / "none")


def test_only_this_machine_is_loopback():
    assert Serving().is_loopback
    assert Serving(host="::1").is_loopback
    assert not Serving(host="0.0.0.0").is_loopback
