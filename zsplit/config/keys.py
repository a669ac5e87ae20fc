"""What the declarations say in words: the list of keys, the check of a value, the sentence of its refusal."""

import difflib
import json
import math
import tomllib
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from zsplit.config.sections import SECTIONS
from zsplit.errors import ConfigError


class KeyDoc(NamedTuple):
    """One key as `zsplit config` and the docs show it: `type` in words, `choices` empty where it is open."""

    key: str
    type: str
    default: Any
    choices: tuple[str, ...]
    doc: str


@cache
def keys() -> tuple[KeyDoc, ...]:
    """Return every key with its type, default and one line of what it does."""
    return tuple(_document(key, hint) for key, hint in _hints().items())


def table() -> str:
    """Return the keys as the Markdown table that `docs/config.md` contains."""
    rows = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for each in keys():
        default = "unset" if each.default is None else f"`{as_toml(each.default)}`"
        rows.append(f"| `{each.key}` | {each.type} | {default} | {each.doc} |")
    return "\n".join(rows) + "\n"


def checked(key: str, value: Any) -> Any:
    """Return the value in the key's own type. Raises `ConfigError` where it is none of the key's values."""
    if key not in _hints():
        raise ConfigError(f"{key} is not a key of the config: {_nearest_key(key)}.")
    try:
        result = msgspec.convert(value, _hints()[key])
    except msgspec.ValidationError as error:
        raise ConfigError(_refusal(key, value)) from error
    if isinstance(result, float) and not math.isfinite(result):
        raise ConfigError(_refusal(key, value))
    return result


def takes_only_text(key: str) -> bool:
    """Say whether no number, list or truth value can be meant."""
    return key in _hints() and isinstance(_bare(_hints()[key]), inspect.StrType | inspect.LiteralType)


def nearest_section(name: str) -> str:
    """Return what to say where there is no such section."""
    near = difflib.get_close_matches(name, SECTIONS, n=1)
    return f"the nearest is [{near[0]}]" if near else f"there are [{'], ['.join(SECTIONS)}]"


def as_toml(value: Any) -> str:
    """Return the value as it stands in the file."""
    return json.dumps(value, ensure_ascii=False, default=str)


@cache
def _hints() -> dict[str, Any]:
    return {
        f"{section}.{name}": hint
        for section, kind in SECTIONS.items()
        for name, hint in get_type_hints(kind, include_extras=True).items()
    }


def _document(key: str, hint: Any) -> KeyDoc:
    section, _, name = key.partition(".")
    default = getattr(SECTIONS[section](), name)
    doc = next(note.description for note in hint.__metadata__ if note.description)
    return KeyDoc(key, _type(hint), default, _choices(hint), doc)


def _bare(hint: Any) -> inspect.Type:
    kind = inspect.type_info(hint)
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint.__origin__) if get_origin(hint.__origin__) is Literal else ()


def _type(hint: Any) -> str:
    choices = _choices(hint)
    return " or ".join(map(as_toml, choices)) if choices else _words(inspect.type_info(hint))


def _words(kind: inspect.Type) -> str:
    match kind:
        case inspect.Metadata(type=inner, extra_json_schema=extra):
            return str((extra or {}).get("title") or _words(inner))
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "integer" + _limits(kind)
        case inspect.FloatType():
            return "number" + _limits(kind)
        case inspect.UnionType(types=types):
            return " or ".join(_words(each) for each in types if not isinstance(each, inspect.NoneType))
        case inspect.VarTupleType(item_type=item):
            return f"list, each {_words(item)}"
        case _:
            return "text"


def _limits(kind: inspect.IntType | inspect.FloatType) -> str:
    limits = {"≥": kind.ge, ">": kind.gt, "≤": kind.le, "<": kind.lt}
    return " and".join(f" {sign} {limit}" for sign, limit in limits.items() if limit is not None)


def _refusal(key: str, value: Any) -> str:
    doc = next(each for each in keys() if each.key == key)
    return f"{key} must be {_with_article(doc.type)}, not {as_toml(value)}{_nearest_value(doc, value)}."


def _with_article(kind: str) -> str:
    if kind.startswith("integer"):
        return f"an {kind}"
    return f"a {kind}" if kind.startswith(("number", "list", "name")) else kind


def _nearest_value(doc: KeyDoc, value: Any) -> str:
    near = difflib.get_close_matches(str(value), doc.choices, n=1)
    if not near and doc.type.startswith(("integer", "number")) and isinstance(value, str):
        near = [text for text in (value, f"0{value}") if _is_number(text)]
        return f": write {near[0]}" if near else ""
    return f": the nearest is {as_toml(near[0])}" if near else ""


def _is_number(text: str) -> bool:
    try:
        return isinstance(tomllib.loads(f"value = {text}")["value"], int | float)
    except tomllib.TOMLDecodeError:
        return False


def _nearest_key(key: str) -> str:
    section, _, name = key.rpartition(".")
    if key in SECTIONS:
        return f"it is a section, with the keys {', '.join(SECTIONS[key].__struct_fields__)}"
    namesakes = [each for each in _hints() if each.partition(".")[2] == name]
    near = namesakes or difflib.get_close_matches(key, _hints(), n=1)
    if near:
        return "the nearest is " + " or ".join(near)
    if section in SECTIONS:
        return f"[{section}] has " + ", ".join(SECTIONS[section].__struct_fields__)
    return nearest_section(section or name)
