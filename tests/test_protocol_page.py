"""The protocol page says what the code says; `python tests/test_protocol_page.py` writes its generated parts anew."""

import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from msgspec import structs

from zsplit import greeting
from zsplit.config import keys
from zsplit.wire import frames, messages, transfer

PAGE = Path(__file__).parents[1] / "broker" / "README.md"

CONTROL: tuple[Any, ...] = get_args(messages.ControlMessage)
DATA: tuple[Any, ...] = get_args(messages.DataMessage)
ARRAYS: tuple[Any, ...] = (messages.Flow, messages.Share, messages.Span, messages.TensorMeta)
RECORDS: tuple[Any, ...] = (messages.Lease, *messages.Record.__subclasses__(), *ARRAYS)

WORDS = {str: "text", int: "integer", float: "number", bytes: "bytes", bool: "truth value"}


def message_table() -> str:
    """Return every message: name, wire tag, connection, direction, meaning, fields in wire order."""
    head = "| message | tag | connection | direction | meaning | fields |\n|---|---|---|---|---|---|\n"
    rows = [(kind, "control") for kind in CONTROL] + [(kind, "data") for kind in DATA]
    return head + "".join(_message_row(kind, connection) for kind, connection in rows)


def record_table() -> str:
    """Return every record that messages contain: name, tag in a union, encoding, meaning, fields in wire order."""
    head = "| record | tag | encoded as | meaning | fields |\n|---|---|---|---|---|\n"
    kinds = f"| `What` |  | text | What bytes are: they are counted by it. | {_words(messages.What)} |\n"
    return head + "".join(_record_row(kind) for kind in RECORDS) + kinds


def limit_table() -> str:
    """Return the numbers that the rules of the page speak of."""
    config = {key.key: key.default for key in keys()}
    rows = {
        "protocol version": messages.PROTOCOL,
        "seconds between hellos, and between attaches": f"{greeting.RETRY_SECONDS:g}",
        "bytes of a control message, at most": f"{frames.MAX_CONTROL:,}",
        "bytes of a data header, at most": f"{frames.MAX_HEADER:,}",
        "frames behind a data header, at most": frames.MAX_FRAMES,
        "bytes of a data frame, at most": f"{config['broker.max_message_mb']:,} MiB (`broker.max_message_mb`)",
        "bytes of a chunk, at most": f"{frames.CHUNK:,}",
        "unanswered pulls for one state, at most": transfer.CREDIT,
        "seconds between beats": f"{config['link.beat_seconds']:g} (`link.beat_seconds`)",
        "seconds of silence after which either end is lost": f"{config['link.lease_seconds']:g} (`link.lease_seconds`)",
        "seconds without progress after which a peer is lost":
            f"{config['link.progress_seconds']:g} (`link.progress_seconds`; 0: not checked)",
    }  # fmt: skip
    return "| limit | value |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


BLOCKS: dict[str, Callable[[], str]] = {"messages": message_table, "records": record_table, "limits": limit_table}


def _message_row(kind: Any, connection: str) -> str:
    direction, meaning = _direction(_first_line(kind))
    fields = [each for each in structs.fields(kind) if connection == "control" or each.name not in ("run", "session")]
    return f"| `{kind.__name__}` | `{_tag(kind)}` | {connection} | {direction} | {meaning} | {_fields(fields)} |\n"


def _record_row(kind: Any) -> str:
    if issubclass(kind, tuple):
        encoding, tag = "array", ""
        cell = ", ".join(f"`{name}` {_words(hint)}" for name, hint in kind.__annotations__.items())
    else:
        encoding = "array" if kind.__struct_config__.array_like else "map"
        tag, cell = f"`{_tag(kind)}`" if _tag(kind) else "", _fields(structs.fields(kind))
    return f"| `{kind.__name__}` | {tag} | {encoding} | {_first_line(kind)} | {cell} |\n"


def _tag(kind: Any) -> str:
    return str(kind.__struct_config__.tag or "")


def _first_line(kind: Any) -> str:
    return str(kind.__doc__).strip().splitlines()[0]


def _direction(text: str) -> tuple[str, str]:
    """Return who sends to whom, and the rest of a docstring such as `Peer → broker: who I am.`

    What has no arrow is neither from nor for the broker: it is relayed.
    """
    arrow = re.match(r"(\w+ → \w+)[:,] *(.*)", text)
    return (arrow[1], arrow[2][0].upper() + arrow[2][1:]) if arrow else ("Peer → peer", text)


def _fields(fields: Any) -> str:
    return ", ".join(f"`{field.name}` {_type(field.type)}{_default(field)}" for field in fields) or "–"


def _default(field: structs.FieldInfo) -> str:
    if field.default is not msgspec.NODEFAULT:
        return f" = `{msgspec.json.encode(field.default).decode()}`"
    return " = `{}`" if field.default_factory is not msgspec.NODEFAULT else ""


def _type(hint: Any) -> str:
    return "`What`" if hint == messages.What else _words(hint)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"({', '.join(map(_words, arguments))})"
    if origin is tuple:
        item = _words(arguments[0])
        return f"list of {f'({item})' if ' or ' in item else f'{item}s' if arguments[0] in WORDS else item}"
    if origin is dict:
        return f"map from {_words(arguments[0])} to {_words(arguments[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join("nil" if each is type(None) else _words(each) for each in arguments)
    return WORDS.get(hint) or f"`{hint.__name__}`"


def _blocks() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every block between markers."""
    yield from re.findall(r"<!-- (\w+): begin -->\n(.*?)<!-- \1: end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def written_anew(page: str) -> str:
    """Return the page with its generated parts as the code has them."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = page.split(begin)
        page = before + begin + make() + end + rest.split(end)[1]
    return page


@pytest.mark.parametrize("block", BLOCKS)
def test_the_tables_on_the_page_are_those_of_the_code(block: str) -> None:
    assert dict(_blocks())[block] == BLOCKS[block](), "run `python tests/test_protocol_page.py` to write them anew"


def test_the_page_has_no_other_generated_parts() -> None:
    assert sorted(name for name, _ in _blocks()) == sorted(BLOCKS)


def test_no_two_messages_of_a_connection_share_a_tag() -> None:
    for kinds in (CONTROL, DATA):
        tags = [_tag(kind) for kind in kinds]
        assert len(set(tags)) == len(tags)


def test_every_record_that_a_message_contains_is_on_the_page() -> None:
    def inside(kind: Any) -> Iterator[Any]:
        hints = list(get_type_hints(kind).values())
        while hints:
            hint = hints.pop()
            hints += get_args(hint)
            if isinstance(hint, type) and hint.__module__ == messages.__name__:
                yield hint
                yield from inside(hint)

    assert {record for kind in (*CONTROL, *DATA) for record in inside(kind)} == set(RECORDS)


def test_the_rules_speak_only_of_messages_and_records_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for _, block in _blocks():
        text = text.replace(block, "")
    named = set(re.findall(r"`([A-Z][a-z]\w*)`", text))
    known = {"What", *(kind.__name__ for kind in (*CONTROL, *DATA, *RECORDS))}
    assert named == known


if __name__ == "__main__":
    PAGE.write_text(written_anew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
