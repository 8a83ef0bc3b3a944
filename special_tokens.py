"""What tokenizer_config.json and its like declare: which tokens are special, and by which names."""

from pathlib import Path
from typing import Any

from files import own_file, read_json


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object of a file, {} where there is no such file."""
    path = own_file(folder, name)
    return read_json(path) if path.is_file() else {}


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json; older folders declare special tokens in a file of their own, which goes before."""
    settings = read_settings(folder, "tokenizer_config.json")
    older = "added_tokens_decoder" not in settings
    return settings | (read_settings(folder, "special_tokens_map.json") if older else {})


def token_name(token: Any) -> str | None:
    """Return a token's string; the settings write a token as that, or as an object around it."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def named_special(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens that have a key of their own: bos_token and its like, and a model's that sees."""
    keys = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    named = {key: settings[key] for key in keys if key in settings}
    named |= {key: value for key, value in settings.items() if key.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        named |= settings[key] if isinstance(settings.get(key), dict) else {}
    return named


def declared_special(settings: dict[str, Any]) -> list[Any]:
    """Return all tokens that the settings declare special, those in lists last."""
    declared = [*named_special(settings).values()]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        declared += settings[key] if isinstance(settings.get(key), list) else []
    return [token for token in declared if token_name(token)]


def special_names(settings: dict[str, Any]) -> set[str]:
    """Return the strings of `declared_special`."""
    return {name for name in map(token_name, declared_special(settings)) if name}


def token_flags(token: Any) -> dict[str, bool]:
    """Return what a token's object says of how it is found in a text, by the names of package `tokenizers`."""
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return {name: bool(token[name]) for name in names if name in token} if isinstance(token, dict) else {}
