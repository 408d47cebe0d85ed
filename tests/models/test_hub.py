"""Fetching checkpoints from a hub on localhost, whole and broken, and from none at all."""

from __future__ import annotations

import errno
import io
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from models import hub
from models.errors import DownloadError
from models.hub import fetch_repository, files_to_fetch
from models.safetensors_folder import INDEX, read_folder
from tests.models.fake_hub import COMMIT, REPOSITORY, FakeHub
from tests.models.safetensors_writer import write_sharded

pytest.importorskip("huggingface_hub")

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TENSORS = {f"t{i}": np.full((256, 512), i, np.float32) for i in range(4)}
CHUNK = 64 << 10


def repository_files(folder: Path) -> dict[str, bytes]:
    """A checkpoint of two shards of 1 MiB, and what else is found in repositories."""
    items = list(TENSORS.items())
    write_sharded(folder, {SHARDS[0]: dict(items[:2]), SHARDS[1]: dict(items[2:])})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model"):
        files[name] = b"{}" + name.encode()
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.json"):
        files[name] = b"not wanted"
    return files


WANTED = {INDEX, *SHARDS, "config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model"}


@pytest.fixture
def no_settings(tmp_path, monkeypatch) -> Iterator[Path]:
    """huggingface_hub with a cache of its own and nobody's settings; returns its cache.

    It reads the environment when it is imported, so its constants are what is changed.
    """
    import huggingface_hub.constants as constants
    from huggingface_hub.utils import _http

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    cache = tmp_path / "cache" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    yield cache
    _http.close_session()


def point_to(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path, monkeypatch, no_settings) -> Iterator[FakeHub]:
    server = FakeHub(repository_files(tmp_path / "source"))
    point_to(monkeypatch, server.endpoint)
    yield server
    server.close()


def refusal(name: str = REPOSITORY) -> str:
    """The one line with which the checkpoint cannot be had."""
    with pytest.raises(DownloadError) as caught:
        fetch_repository(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_loading_needs_is_fetched_once(server, capfd):
    folder = fetch_repository(REPOSITORY)
    assert {path.name for path in folder.iterdir()} == WANTED
    assert {name: (folder / name).read_bytes() for name in WANTED} == {
        name: server.files[name] for name in WANTED
    }
    assert read_folder(folder).shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"Fetching {REPOSITORY} from {server.endpoint}: 7 files, 2.1 MB")
    server.sent.clear()
    assert fetch_repository(REPOSITORY) == folder
    assert server.sent == []
    assert capfd.readouterr() == ("", "")


def test_a_revision_is_asked_for_by_name(server):
    assert fetch_repository(f"{REPOSITORY}@v1").name == COMMIT
    assert f"GET api/models/{REPOSITORY}/revision/v1" in server.requests
    assert fetch_repository(f"{REPOSITORY}@{COMMIT}").name == COMMIT


def test_a_cut_connection_resumes_where_it_was(server):
    cut = 10 * CHUNK + 5000

    def cut_once(handler, file):
        if file != SHARDS[1] or handler.command == "HEAD" or handler.headers.get("Range"):
            return False
        handler.file(file, upto=cut)
        return True

    server.fault = cut_once
    folder = fetch_repository(REPOSITORY)
    assert (folder / SHARDS[1]).read_bytes() == server.files[SHARDS[1]]
    size = len(server.files[SHARDS[1]])
    begin = 10 * CHUNK  # whole chunks are kept
    assert [sent for sent in server.weights_sent() if sent[0] == SHARDS[1]] == [
        (SHARDS[1], 0, cut),
        (SHARDS[1], begin, size - begin),
    ]


def test_a_stopped_download_goes_on_with_the_files_it_lacks(server):
    def broken(handler, file):
        if file == SHARDS[1] and handler.command == "GET":
            handler.answer(403, {"X-Error-Message": "quota used up"})
            return True
        return False

    server.fault = broken
    assert "answers 403: quota used up" in refusal()
    server.fault = lambda handler, file: False
    server.sent.clear()
    fetch_repository(REPOSITORY)
    assert [name for name, *_ in server.weights_sent()] == [SHARDS[1]]


def test_without_the_hub_a_whole_copy_in_the_cache_is_used(server, monkeypatch, capfd):
    folder = fetch_repository(REPOSITORY)
    capfd.readouterr()
    server.refuse = (503, "")
    assert fetch_repository(REPOSITORY) == folder
    assert "answers 503; using the copy in" in capfd.readouterr().err
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert fetch_repository(REPOSITORY) == folder
    assert "cannot reach the hub at http://127.0.0.1:9" in capfd.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_repository(f"{REPOSITORY}@{COMMIT}") == folder
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"{REPOSITORY}@{COMMIT}: HF_HUB_OFFLINE is set; using the copy in {folder}\n"
    )


@pytest.mark.parametrize("lost", [SHARDS[1], "tokenizer.json"])
def test_without_the_hub_a_part_in_the_cache_is_not_used(server, monkeypatch, lost):
    (fetch_repository(REPOSITORY) / lost).unlink()
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert "cannot reach the hub" in (message := refusal())
    assert "only a part of it is cached" in message


def test_without_the_hub_and_a_cache_the_message_says_what_helps(no_settings, monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9")
    begin = time.monotonic()
    message = refusal()
    assert time.monotonic() - begin < 2
    for words in (
        "cannot reach the hub at http://127.0.0.1:9 ([Errno",
        f"it is not cached in {no_settings}",
        "a folder with config.json and *.safetensors",
        "HF_ENDPOINT",
        "HTTPS_PROXY",
        "HF_HOME",
    ):
        assert words in message
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and it is not cached" in refusal()


def test_a_hub_that_never_answers_is_given_up(no_settings, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS_BEYOND_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        assert "cannot reach the hub" in refusal()
    assert time.monotonic() - begin < 4


def test_another_server_is_not_taken_for_the_hub(server, monkeypatch):
    monkeypatch.setattr("tests.models.fake_hub.Handler.repository", log_in_first)
    assert f"what answers at {server.endpoint} is not the hub" in refusal()


def log_in_first(handler, revision) -> None:
    handler.answer(200, {"Content-Type": "text/html"}, b"<html>Welcome! Please log in.</html>")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", ["no repository org/tiny on http", "private", "HF_TOKEN"]),
        (404, "", ["no repository org/tiny on http"]),
        (401, "RepoNotFound", ["no repository org/tiny on http", "HF_TOKEN"]),
        (401, "", ["does not accept the token given by HF_TOKEN"]),
        (403, "GatedRepo", ["org/tiny is gated", "accept its licence on http", "HF_TOKEN"]),
        (403, "", ["org/tiny: the hub at http", "answers 403: no reason given"]),
        (502, "", ["answers 502, and it is not cached"]),
    ],
)
def test_refusals_say_what_to_do(server, status, code, words):
    server.refuse = (status, code)
    message = refusal()
    assert [word for word in words if word not in message] == []


def test_a_repository_whose_files_are_gated_is_called_so(server):
    """The hub tells everybody what is in a gated repository."""

    def gated(handler, file):
        handler.answer(401, {"X-Error-Code": "GatedRepo"})
        return True

    server.fault = gated
    assert f"accept its licence on {server.endpoint}/{REPOSITORY}" in refusal()


def test_an_unknown_revision_is_named(server):
    assert f"{REPOSITORY} has no revision 'v9'" in refusal(f"{REPOSITORY}@v9")


def test_a_name_that_cannot_be_one_is_refused(server):
    assert "'org/a..b' cannot be the name of a repository" in refusal("org/a..b")
    assert server.requests == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json", "pytorch_model.bin"], "no weights in safetensors; it has pytorch_model"),
        (["config.json"], "no weights in safetensors; it has none at all"),
        (["a.safetensors", "b.safetensors"], f"several weights and no {INDEX}: a.safetensors, b."),
        (["onnx/model.safetensors", "README.md"], "no weights in safetensors; it has README.md"),
    ],
    ids=str,
)
def test_a_repository_without_usable_weights_says_what_it_has(server, names, words):
    server.files = dict.fromkeys(names, b"x")
    assert words in refusal()
    assert server.sent == []


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model.safetensors", INDEX, *SHARDS], ["model.safetensors"]),
        ([INDEX, *SHARDS, "consolidated.safetensors"], [*SHARDS]),
        (["weights.safetensors", "original/x.safetensors"], ["weights.safetensors"]),
    ],
    ids=str,
)
def test_the_same_weights_are_not_fetched_twice(names, weights):
    assert [name for name in files_to_fetch(names) if name.endswith(".safetensors")] == weights


def test_a_disk_without_room_is_refused_before_the_download(server, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: full)
    message = refusal()
    assert "needs 2.1 MB more" in message
    assert "1.0 MB free" in message
    assert "HF_HOME" in message
    assert server.sent == []


def test_a_disk_that_fills_up_is_named(server, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert refusal().startswith("the disk is full, at ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_progress_bar_that_vanishes(server, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    fetch_repository(REPOSITORY)
    announced, _, bar = terminal.getvalue().partition("\n")
    assert announced.startswith("Fetching")
    assert "0.00/2.10M" in bar
    assert "\n" not in bar
    assert bar.rpartition("\r")[0].endswith(" ")


def test_an_interrupt_does_not_wait_for_the_files(server, no_settings, monkeypatch):
    """Shards that would take four seconds more: none is waited for, and no part stays behind."""
    begin = time.monotonic()
    calls = itertools.count()
    main_thread = threading.get_ident()
    aborted = []
    monkeypatch.setattr(
        "huggingface_hub.utils._xet.abort_xet_session", lambda: aborted.append("xet")
    )

    def slowly(handler, file):
        if file not in SHARDS or handler.command == "HEAD":
            return False
        content = server.files[file]
        handler.answer(200, {}, content[: CHUNK * 2], len(content))
        if next(calls) == 0:
            signal.pthread_kill(main_thread, signal.SIGINT)
        try:
            for part in range(CHUNK * 2, len(content), CHUNK):
                handler.wfile.write(content[part : part + CHUNK])
                time.sleep(0.3)
        except OSError:
            pass
        return True

    server.fault = slowly
    with pytest.raises(KeyboardInterrupt):
        fetch_repository(REPOSITORY)
    assert aborted == ["xet"]
    while list(no_settings.rglob("*.incomplete")):
        time.sleep(0.05)
    assert time.monotonic() - begin < 3


FETCH = """
import sys
from models.hub import fetch_repository
print(fetch_repository(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_environment_applies_and_a_pipe_gets_no_progress_bar(tmp_path):
    server = FakeHub(repository_files(tmp_path / "source"))
    settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    finished = subprocess.run(
        [sys.executable, "-c", FETCH, REPOSITORY],
        env=environment | settings,
        capture_output=True,
        text=True,
    )
    server.close()
    folder = tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert finished.stdout == f"{folder}\n"
    assert finished.stderr.splitlines() == [
        f"Fetching {REPOSITORY} from {server.endpoint}: 7 files, 2.1 MB, into "
        f"{tmp_path / 'home' / 'hub'}"
    ]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'jax_chunkattn[experiments]'" in refusal()
