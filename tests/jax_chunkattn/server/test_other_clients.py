"""LiteLLM and LangChain ask the endpoint as they are. They take seconds to import, and warn."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.jax_chunkattn.engine.engines import BytePairs
from tests.jax_chunkattn.server.endpoints import Running, write_chat
from tests.jax_chunkattn.toy import greedy_without_cache

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Why?"}]
LITELLM = f"""
import litellm, sys
asked = dict(
    model="hosted_vllm/tiny", api_base=sys.argv[1] + "/v1", api_key="none", temperature=0,
    messages={MESSAGES!r}, max_tokens=6,
)
done = litellm.completion(**asked)
stream = litellm.completion(**asked, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
assert text == done.choices[0].message.content
assert done.usage.completion_tokens == 6
print(ascii(text))
"""
LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(
    model="tiny", base_url=sys.argv[1] + "/v1", api_key="none", temperature=0, max_tokens=6
)
text = chat.invoke("Why?").content
assert "".join(piece.content for piece in chat.stream("Why?")) == text
print(ascii(text))
"""


@pytest.mark.parametrize(
    ("module", "code"),
    [("litellm", LITELLM), ("langchain_openai", LANGCHAIN)],
    ids=["litellm", "langchain"],
)
def test_a_chat_is_answered(tiny: Running, module: str, code: str):
    if find_spec(module) is None:
        pytest.skip(f"needs {module}")
    done = subprocess.run(
        [sys.executable, "-c", code, tiny.url],
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = BytePairs().decode(greedy_without_cache(write_chat(MESSAGES, tools=None), 6))
    assert done.stdout.splitlines()[-1] == ascii(answer)
