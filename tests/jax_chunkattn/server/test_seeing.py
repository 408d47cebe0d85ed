"""Metrics by vLLM's names and ours, the live tree, and the page that draws it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.jax_chunkattn.engine.engines import BytePairs, make_engine
from tests.jax_chunkattn.server.endpoints import MODEL, Running, held, opened, running, until


def metrics_of(found: Running) -> dict[tuple[str, str], float]:
    """By name and the label beside the model's."""
    reply = found.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == MODEL
            if "le" not in labels:
                samples[sample.name, "".join(labels.values())] = sample.value
    return samples


def test_metrics_are_what_happened():
    with running() as found:
        prompt = [at % 60 for at in range(40)]
        for _ in range(2):
            found.complete(prompt, max_tokens=5, n=2)
        found.complete(prompt, max_tokens=1, cache_salt="other")
        found.complete("a", colour="red")
        told, stats = metrics_of(found), found.engine.stats
    use = stats.prompts
    expected = {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:prefix_cache_queries_total": use.num_tokens,
        "vllm:prefix_cache_hits_total": use.num_found,
        "vllm:generation_tokens_total": 21,
        "vllm:num_preemptions_total": 0,
        "vllm:time_to_first_token_seconds_count": 5,
        "vllm:request_time_per_output_token_seconds_count": 4,
        "vllm:e2e_request_latency_seconds_count": 5,
        "chunkattn:chunk_reads_total": stats.planned_reads,
        "chunkattn:chunk_reads_saved_total": stats.planned_reads_unshared - stats.planned_reads,
    }
    assert {name: told[name, ""] for name in expected} == expected
    assert told["vllm:request_success_total", "length"] == 5
    assert told["chunkattn:requests_refused_total", "400"] == 1
    for reason in ("new", "salt", "too_short"):
        assert told["chunkattn:prompt_tokens_missed_total", reason] == getattr(use, reason) > 0
    plans = [told["chunkattn:plans_total", decision] for decision in ("shared", "unshared")]
    assert sum(plans) == stats.plans > 0
    assert told["chunkattn:chunk_reads_saved_total", ""] > 0


def test_an_endpoint_that_was_restarted_is_warm_by_its_disk(tmp_path: Path):
    """And says in its answers and its metrics what it found there."""
    tiers = {"disk": tmp_path, "disk_memory": "10MB", "load": "always"}
    prompt = [at % 60 for at in range(40)]
    for cached in (0, 32):
        with make_engine(tokenizer=BytePairs(), **tiers) as engine, running(engine) as found:
            usage = found.complete(prompt, max_tokens=5).value["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == cached
            told = metrics_of(found)
    assert told["vllm:prefix_cache_hits_total", ""] == 32
    assert told["chunkattn:prompt_tokens_found_total", "disk"] == 32
    assert told["chunkattn:tier_tokens_loaded_total", "disk"] == 32
    assert told["chunkattn:tier_chunks", "disk"] >= 2
    assert told["chunkattn:tier_failures_total", "disk too slow"] == 0


def test_the_tree_shows_who_shares_what(tiny: Running):
    prompt = list(range(64))
    connections = [opened(tiny, prompt=[*prompt, at], max_tokens=600) for at in range(3)]
    until(
        lambda: len([one for one in tiny.get("/tree").value["requests"] if one["new_tokens"]]) == 3
    )
    seen = tiny.get("/tree").value
    shared = [run for run in seen["runs"] if run["users"] == 3]
    assert [(run["chunks"], run["parent"]) for run in shared] == [(4, None)]
    assert {one["state"] for one in seen["requests"]} == {"decode"}
    for one in seen["requests"]:
        path, at = [], one["run"]
        while at is not None:
            path.append(seen["runs"][at]["chunks"])
            at = seen["runs"][at]["parent"]
        assert path[-1] == 4
        assert sum(path) <= one["chunks"]
    pool = seen["pool"]
    assert pool["in_use"] + pool["cached"] + pool["free"] == pool["chunks"]
    assert seen["running"] == 3
    for connection in connections:
        connection.close()
    until(lambda: not tiny.get("/tree").value["requests"])
    until(lambda: tiny.get("/tree").value["running"] == 0)
    cached = tiny.get("/tree").value
    assert all(run["users"] == 0 for run in cached["runs"])
    assert cached["chunk_reads_saved"] > 0


def test_nothing_in_the_tree_tells_what_was_asked(tiny: Running):
    tiny.complete("a secret that nobody must see", max_tokens=1, cache_salt="salt of mine")
    body = tiny.get("/tree").body
    assert b"secret" not in body
    assert b"mine" not in body
    assert b"salt of" not in body


def test_those_who_watch_share_one_look(tiny: Running, monkeypatch: pytest.MonkeyPatch):
    looks = []
    real = tiny.engine.view_tree
    monkeypatch.setattr(tiny.engine, "view_tree", lambda most: looks.append(1) or real(most))
    for _ in range(20):
        assert tiny.get("/tree").status == 200
    assert len(looks) <= 3


def test_a_long_call_holds_up_no_other_path(tiny: Running):
    with held(tiny):
        for path in ("/health", "/ready", "/v1/models", "/openapi.json", "/"):
            assert tiny.get(path).status == 200


class Page(HTMLParser):
    """What is in a page, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in ("meta", "link", "input", "br", "img"):
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"] or "")
        self.loads += [given[name] or "" for name in ("src", "href") if name in given]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_the_page_is_one_file_that_loads_nothing(tiny: Running):
    reply = tiny.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    page = Page()
    page.feed(reply.body.decode())
    page.close()
    assert page.open == []
    assert page.loads == ["data:,"]
    assert len(set(page.ids)) == len(page.ids)
    [script] = page.scripts
    assert set(re.findall(r'\bat\("(\w+)"\)', script)) <= set(page.ids)
    assert "innerHTML" not in script
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", script)
    paths = set(re.findall(r'(?:get|fetch)\("(/[\w/]*)"', script))
    assert paths == {"/tree", "/v1/models", "/v1/chat/completions"}


def test_the_page_reads_only_what_the_tree_has(tiny: Running):
    """Its script is not run here: the names that it reads are looked for."""
    tiny.complete(list(range(40)), max_tokens=1)
    page = Page()
    page.feed(tiny.get("/").body.decode())
    until(lambda: tiny.get("/tree").value["runs"])
    seen = tiny.get("/tree").value
    [script] = page.scripts
    for name in re.findall(r"\bnow\.(\w+)", script):
        assert name in seen, name
    for name in re.findall(r"\bnow\.pool\.(\w+)", script):
        assert name in seen["pool"], name
    run = seen["runs"][0]
    for name in set(re.findall(r"\brun\.(\w+)", script)):
        assert name in run, name


def test_the_description_names_what_is_served(tiny: Running):
    told = tiny.get("/openapi.json").value
    assert told["openapi"] == "3.1.0"
    posts = {path for path, methods in told["paths"].items() if "post" in methods}
    assert posts == {"/v1/completions", "/v1/chat/completions", "/v1/score"}
    references = re.findall(r"'#/components/schemas/(\w+)'", str(told))
    assert set(references) <= set(told["components"]["schemas"])
    assert "cache_salt" in told["components"]["schemas"]["ChatRequest"]["properties"]
