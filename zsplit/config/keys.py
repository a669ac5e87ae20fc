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
    kind = _table_of(key)
    if kind is not None and isinstance(value, list | tuple):
        for each in value:
            _check_table(key, kind, each)
    return _converted(key, _hints()[key], value)


def _converted(name: str, hint: Any, value: Any) -> Any:
    try:
        result = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise ConfigError(_refusal(name, hint, value)) from error
    if isinstance(result, float) and not math.isfinite(result):
        raise ConfigError(_refusal(name, hint, value))
    return result


def _check_table(key: str, kind: inspect.StructType, table: Any) -> None:
    """Check one table of a list of tables, key by key."""
    if not isinstance(table, dict):
        raise ConfigError(_refusal(key, _hints()[key], table))
    hints = get_type_hints(kind.cls, include_extras=True)
    for name, value in table.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            there = f"the nearest is {near[0]}" if near else f"it has {', '.join(hints)}"
            raise ConfigError(f"{name} is not a key of [[{key}]]: {there}.")
        _converted(f"{key}.{name}", hints[name], value)
    for field in kind.fields:
        if field.required and field.name not in table:
            raise ConfigError(
                f"A [[{key}]] table lacks {field.name}: give it {_with_article(_type(hints[field.name]))}."
            )


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


@cache
def _table_of(key: str) -> inspect.StructType | None:
    """Return what the tables are that this key is a list of; None where it is none."""
    kind = _bare(_hints()[key])
    item = kind.item_type if isinstance(kind, inspect.VarTupleType) else None
    return item if isinstance(item, inspect.StructType) else None


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


def _literals(kind: inspect.Type) -> tuple[str, ...]:
    """Return the texts that are values as they stand, among others or alone."""
    match kind:
        case inspect.Metadata(type=inner):
            return _literals(inner)
        case inspect.UnionType(types=types):
            return tuple(text for each in types for text in _literals(each))
        case inspect.LiteralType(values=values):
            return tuple(map(str, values))
        case _:
            return ()


def _type(hint: Any) -> str:
    return _words(inspect.type_info(hint))


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
            open_first = sorted(types, key=lambda each: isinstance(each, inspect.LiteralType))
            return " or ".join(_words(each) for each in open_first if not isinstance(each, inspect.NoneType))
        case inspect.LiteralType(values=values):
            return " or ".join(map(as_toml, values))
        case inspect.VarTupleType(item_type=inspect.StructType(fields=fields)):
            return "list of tables with " + ", ".join(field.name for field in fields)
        case inspect.VarTupleType(item_type=item):
            return f"list, each {_words(item)}"
        case _:
            return "text"


def _limits(kind: inspect.IntType | inspect.FloatType) -> str:
    limits = {"≥": kind.ge, ">": kind.gt, "≤": kind.le, "<": kind.lt}
    return " and".join(f" {sign} {limit}" for sign, limit in limits.items() if limit is not None)


def _refusal(name: str, hint: Any, value: Any) -> str:
    kind = _type(hint)
    near = _nearest_value(kind, _literals(inspect.type_info(hint)), value)
    return f"{name} must be {_with_article(kind)}, not {as_toml(value)}{near}."


def _with_article(kind: str) -> str:
    if kind.startswith("integer"):
        return f"an {kind}"
    return f"a {kind}" if kind.startswith(("number", "list", "name")) else kind


def _nearest_value(kind: str, literals: tuple[str, ...], value: Any) -> str:
    near = difflib.get_close_matches(str(value), literals, n=1)
    if not near and kind.startswith(("integer", "number")) and isinstance(value, str):
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
