"""The config of a run: frozen structs, TOML in, clear errors out. No torch.

A `Config` that exists is legal: however it is made, every value and every combination has been checked.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from zsplit.config import datasets, rules
from zsplit.config.keys import KeyDoc, checked, keys, nearest_section, table, takes_only_text
from zsplit.config.sections import (
    SECTIONS,
    AggregateSection,
    BrokerSection,
    ClientSection,
    CodecSection,
    DataSection,
    LinkSection,
    ModelSection,
    PlanSection,
    RunSection,
    ScheduleSection,
    ServerSection,
    TrainSection,
)
from zsplit.config.shape import link_of, ranges
from zsplit.errors import ConfigError

__all__ = [
    "Config",
    "KeyDoc",
    "cut_of",
    "differences",
    "from_json",
    "keys",
    "link_of",
    "load_config",
    "table",
    "to_json",
    "to_toml",
]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole config of a run. Making one raises `ConfigError` where it could not be run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    schedule: ScheduleSection = ScheduleSection()
    aggregate: AggregateSection = AggregateSection()
    codec: CodecSection = CodecSection()
    link: LinkSection = LinkSection()
    plan: PlanSection = PlanSection()
    broker: BrokerSection = BrokerSection()
    server: ServerSection = ServerSection()
    client: ClientSection = ClientSection()

    def __post_init__(self) -> None:
        for key, value in _values(self).items():
            checked(key, value)
        contradictions = chain(
            datasets.in_names(self.data),
            datasets.in_partition(self.data, self.schedule.clients, self.train.labels),
            datasets.in_augment(self.data, self.model.input),
            rules.in_training(self.train),
            rules.in_rates(self.train),
            rules.in_schedule(self.schedule, self.run),
            rules.in_server_model(self.schedule, self.train, self.model),
            rules.in_async(self.schedule),
            rules.in_client_cuts(self.model, self.schedule, self.plan, self.train),
            rules.in_aggregation(self.aggregate, self.schedule),
            rules.in_patience(self.run, self.data),
            rules.in_codecs(self.codec, self.model),
            rules.in_link(self.link),
            rules.in_client_links(self.link, self.schedule.clients),
            rules.in_planning(self.model, self.train, self.plan),
            rules.in_labels(self.model, self.train, self.plan),
            rules.in_ports(self.broker),
        )
        for sentence in contradictions:
            raise ConfigError(sentence)


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Sequence[str] | Mapping[str, object] = ()
) -> Config:
    """Return the config of a TOML file (none: the defaults) with single keys set on top.

    `overrides` are texts `"section.key=value"`, the value as TOML or as bare text, or a mapping of
    `"section.key"` to values. Raises `ConfigError` with the key, what was found and the nearest right thing.
    """
    values = {} if path is None else _flat(_read(Path(path).expanduser()))
    values.update(overrides if isinstance(overrides, Mapping) else map(_assignment, overrides))
    return _build(values)


def to_toml(config: Config) -> str:
    """Return the config as a TOML file of all keys that are set; `load_config` reads back an equal one."""
    return tomli_w.dumps(_set_keys(msgspec.to_builtins(config)))


def to_json(config: Config) -> bytes:
    """Return the config as the broker hands it out."""
    return msgspec.json.encode(config)


def from_json(data: bytes) -> Config:
    """Return the config that `to_json` wrote. Raises `ConfigError` where it is not one of this version."""
    try:
        tables = msgspec.json.decode(data, type=dict[str, dict[str, Any]])
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"The config cannot be read as JSON of this version ({error}): run the same zsplit at both ends."
        ) from error
    return _build(_flat(tables))


def cut_of(config: Config, client: int) -> str | int:
    """Return the cut that the config names for a client: the last `[[model.client]]` table wins."""
    cut = config.model.cut
    for each in config.model.client:
        if any(first <= client <= last for first, last in ranges(each.clients)):
            cut = each.cut
    return cut


def differences(one: Config, other: Config) -> list[str]:
    """Return the keys whose values differ, in the order of the config."""
    left, right = _values(one), _values(other)
    return [key for key in left if left[key] != right[key]]


def _values(config: Config) -> dict[str, Any]:
    return _flat(msgspec.to_builtins(config))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no config file {path}: check the path, or leave it out for the demo.") from error
    except OSError as error:
        raise ConfigError(
            f"Config file {path} cannot be read ({error.strerror}): mend that or name another."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Config file {path} is not text in UTF-8: save it as such.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"Config file {path} is not valid TOML and must be corrected: {error}.") from error


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"section.key": value}`; what stands outside of every section keeps its bare name."""
    values: dict[str, Any] = {}
    for name, content in tables.items():
        if not isinstance(content, dict):
            values[name] = content
        elif name in SECTIONS:
            values.update((f"{name}.{key}", value) for key, value in content.items())
        else:
            raise ConfigError(f"[{name}] is not a section of the config: {nearest_section(name)}.")
    return values


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"`{text}` sets no key: write section.key=value, such as train.lr=0.05.")
    return key, _value(key, value)


def _value(key: str, text: str) -> Any:
    """Return the TOML value that the text is; the text where it is none, or where only text is taken."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed.pop("value")
    return text if parsed or (takes_only_text(key) and not isinstance(value, str)) else value


def _build(values: Mapping[str, Any]) -> Config:
    tables: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        result = checked(key, value)
        section, _, name = key.partition(".")
        tables[section][name] = result
    if tables["train"].get("optimizer", "sgd") != "sgd":
        tables["train"].setdefault("momentum", 0.0)
    if tables["schedule"].get("policy") == "async":
        tables["schedule"].setdefault("optimizer_state", "reset")
    return msgspec.convert(tables, Config)


def _set_keys(value: Any) -> Any:
    """Return the value with those keys of its tables that are set: TOML has no word for nothing."""
    if isinstance(value, dict):
        return {key: _set_keys(each) for key, each in value.items() if each is not None}
    return [_set_keys(each) for each in value] if isinstance(value, list | tuple) else value
