"""The tokenizer of a checkpoint folder in Hugging Face's layout.

tokenizer.json is taken at its word. transformers 5 rebuilds some kinds (`LlamaTokenizer`) from
their vocabulary and merges alone, which can place prefix spaces otherwise; 4 and
`PreTrainedTokenizerFast` read the file as we do. Unlike transformers we add no token that has no
id yet: the model would have no embedding for it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.chat_template import DEFAULT, ChatTemplates
from models.errors import CheckpointError
from models.sizes import is_size, shown
from models.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
PROCESSOR_TEMPLATE = "chat_template.json"

MOST_DIGITS = 10  # of an id; Python refuses to read very many

OTHER_LAYOUTS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")
"""Files that tokenizers come in without a tokenizer.json."""

TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
MORE_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def read_tokenizer_folder(folder: Path) -> ChatTokenizer | None:
    """The tokenizer that `folder` holds as tokenizer.json, or None when it holds no tokenizer.

    Raises CheckpointError, which names the file, when one is malformed or contradicts another, and
    when there is a tokenizer in another layout only.
    """
    if not (folder / TOKENIZER).is_file():
        for name in OTHER_LAYOUTS:
            if (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name}: only {TOKENIZER} can be read; to make one, run "
                    "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) "
                    "where transformers, sentencepiece and tiktoken are installed"
                )
        return None
    config = _read_object(folder / TOKENIZER_CONFIG)
    special_tokens, more = _special_tokens(folder, config)
    backend = load_backend(folder / TOKENIZER)
    _add_declared_tokens(backend, folder / TOKENIZER_CONFIG, config)
    _make_special(backend, [*special_tokens.values(), *more])
    if backend.post_processor is None:
        asked = [name for name in ("bos_token", "eos_token") if config.get(f"add_{name}") is True]
        put_around_texts(backend, asked, special_tokens, folder / TOKENIZER_CONFIG)
    return ChatTokenizer(
        backend,
        stop_ids=_stop_ids(folder, backend, special_tokens),
        templates=ChatTemplates(_templates(folder, config), special_tokens),
    )


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer that `path`, a tokenizer.json, describes; CheckpointError when it is none."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"{path}: not a usable tokenizer: {error}") from error


def put_around_texts(
    backend: tokenizers.Tokenizer, names: Collection[str], texts: Mapping[str, str], path: Path
) -> None:
    """Lets texts begin with "bos_token" and end with "eos_token" where `names` has them."""
    from tokenizers import processors

    ids = {}
    for name in names:
        index = backend.token_to_id(texts[name]) if name in texts else None
        if index is None:
            raise CheckpointError(f"{path}: {name} is to be added to texts, but there is none")
        ids[texts[name]] = index
    begin = [texts[name] for name in names if name == "bos_token"]
    end = [texts[name] for name in names if name == "eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end], special_tokens=list(ids.items())
    )


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Texts of special tokens: those with a name ("bos_token"), and those without.

    special_tokens_map.json counts where the config lists no added tokens.
    """
    sources = [(folder / TOKENIZER_CONFIG, config)]
    if "added_tokens_decoder" not in config:
        path = folder / SPECIAL_TOKENS_MAP
        sources.append((path, _read_object(path)))
    named, more = {}, []
    for path, source in sources:
        entries = {
            name: value
            for name, value in source.items()
            if name in TOKEN_NAMES
            or (name.endswith("_token") and isinstance(value, str | Mapping))  # image_token, say
        }
        for key in MORE_SPECIAL_TOKENS:
            extra = source.get(key) or []
            if isinstance(extra, Mapping):
                entries |= extra
            elif isinstance(extra, list):
                more += [_content(token, f"{path}: {key}") for token in extra]
            else:
                raise CheckpointError(f"{path}: {key} must be a list or an object")
        for name, value in entries.items():
            if value is not None:
                named[name] = _content(value, f"{path}: {name}")
    return named, more


def _content(token: Any, where: str) -> str:
    """The text of a token that is written as its text, or as an object with flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise CheckpointError(f"{where} must be text or an object with a content, got {token!r}")
    return content


def _add_declared_tokens(
    backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any]
) -> None:
    """Adds tokens that the config gives with their ids; its flags win over tokenizer.json's."""
    import tokenizers

    ids, tokens = {}, []
    for index, entry in _declared_tokens(config, path):
        flags = {flag: entry[flag] for flag in TOKEN_FLAGS if flag in entry}
        try:
            tokens.append(tokenizers.AddedToken(**flags))
        except TypeError as error:
            raise CheckpointError(f"{path}: added token {index}: {error}") from error
        ids[entry["content"]] = index
    backend.add_tokens(tokens)
    for content, index in ids.items():
        found = backend.token_to_id(content)
        if found != index:
            raise CheckpointError(
                f"{path}: {content!r} has id {index}, but in {TOKENIZER} it has {found}"
            )


def _make_special(backend: tokenizers.Tokenizer, contents: Iterable[str]) -> None:
    """Those of `contents` that have an id become special tokens, with the flags that they have."""
    import tokenizers

    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    tokens = []
    for content in contents:
        token = added.get(content, tokenizers.AddedToken(content, normalized=False))
        if not token.special and backend.token_to_id(content) is not None:
            token.special = True
            tokens.append(token)
    backend.add_special_tokens(tokens)


def _declared_tokens(
    config: Mapping[str, Any], path: Path
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, Mapping):
        raise CheckpointError(f"{path}: added_tokens_decoder must be an object")
    for key, entry in declared.items():
        if not key.isdecimal() or len(key) > MOST_DIGITS or not isinstance(entry, Mapping):
            raise CheckpointError(f"{path}: added token {shown(key)} must be an object by its id")
        _content(entry, f"{path}: added token {key}")
    yield from sorted((int(key), entry) for key, entry in declared.items())


def _stop_ids(
    folder: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]
) -> list[int]:
    """What generation_config.json declares, else config.json, else the tokenizer's EOS."""
    for name in (GENERATION_CONFIG, CONFIG):
        declared = _read_object(folder / name)
        value = declared.get("eos_token_id")
        if value is None and isinstance(declared.get("text_config"), Mapping):
            value = declared["text_config"].get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not ids or not all(is_size(index, least=0) for index in ids):
                raise CheckpointError(
                    f"{folder / name}: eos_token_id must be an id or a list of ids, got "
                    f"{shown(value)}"
                )
            return ids
    end = special_tokens.get("eos_token")
    index = None if end is None else backend.token_to_id(end)
    return [] if index is None else [index]


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name. Template files take the place of all that the config has."""
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        files[DEFAULT] = folder / TEMPLATE
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    for path, source in (
        (folder / TOKENIZER_CONFIG, config),
        (folder / PROCESSOR_TEMPLATE, _read_object(folder / PROCESSOR_TEMPLATE)),
    ):
        value = source.get("chat_template")
        if isinstance(value, str):
            return {DEFAULT: value}
        if value is not None:
            return _named_templates(value, path)
    return {}


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    templates = {}
    for entry in value if isinstance(value, list) else [value]:
        name, source = (
            (entry.get("name"), entry.get("template"))
            if isinstance(entry, Mapping)
            else (None, None)
        )
        if not isinstance(name, str) or not isinstance(source, str):
            raise CheckpointError(
                f"{path}: chat_template must be text or a list of objects with a name and a "
                "template"
            )
        templates[name] = source
    return templates


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from error
