"""How text is cut into words before byte-level BPE, by the names that GGUF files give.

The names and what they stand for are facts of llama.cpp (`llama-vocab.cpp`); a pattern is written
here as in the tokenizer.json of the models it comes from, which llama.cpp adapts to its own engine.
"""

from __future__ import annotations

import dataclasses

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
)
QWEN2 = CL100K.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}")
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """What one name means.

    Attributes:
      splits: patterns; each cuts what the ones before it left into matches and the rest.
      compose: text is brought into Unicode's composed form (NFC) first. llama.cpp does not, but the
        models' own tokenizers do.
      whole_words: a word that is in the vocabulary is one token, merges or not.
      begins: texts begin with BOS unless the file says otherwise.
    """

    splits: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False
    begins: bool = False


_KINDS = {
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "mellum", "trillion"): (
        PreTokenizer((GPT2,))
    ),
    (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        "mellum2",
    ): PreTokenizer((r"\p{N}", GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "midm-2.0"): (
        PreTokenizer((CL100K,), whole_words=True, begins=True)
    ),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): PreTokenizer((CL100K,)),
    ("qwen2",): PreTokenizer((QWEN2,), compose=True),
    ("qwen35",): PreTokenizer((QWEN35,), compose=True),
    (
        *("stablelm2", "hunyuan", "solar-open", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
        "grok-2",
    ): PreTokenizer((QWEN2,)),
    ("tekken",): PreTokenizer((TEKKEN,), whole_words=True, begins=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): PreTokenizer((O200K,)),
    ("deepseek-coder",): PreTokenizer(
        (
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            r"\p{N}",
        )
    ),
    ("deepseek-v3",): PreTokenizer((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u30ff]+", DEEPSEEK_V3)),
    ("falcon",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    ("default",): PreTokenizer(
        (r"[\p{P}\$\+<=>\^\~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
}

PRE_TOKENIZERS = {name: kind for names, kind in _KINDS.items() for name in names}
"""By the value of `tokenizer.ggml.pre`."""
