"""Code of one's own that a config names: what is allowed is loaded, and nothing else is even imported."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zsplit.errors import ConfigError, DataError
from zsplit.own import load, make

MODULES = {
    "mine_nets/__init__.py": "",
    "mine_nets/small.py": (
        "from os.path import join\n"
        "from mine_netsafe import other\n"
        "from zsplit.errors import DataError\n"
        "class Net:\n    def __init__(self, size): self.size = size\n"
        "def double(x): return 2 * x\n"
        "def fail(x): raise ValueError('no\\nway.')\n"
        "def refuse(x): raise DataError('No such set: make one.')\n"
        "number = 3\n"
    ),
    "mine_netsafe.py": "def other(x): return x\n",
    "mine_broken.py": "import mine_nowhere\n",
    "mine_wrong.py": "1 / 0\n",
}


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the modules where Python finds them; none of them is loaded before the test, nor left after it."""
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in loaded():
        del sys.modules[name]


def loaded() -> set[str]:
    """Return which of the modules have been imported."""
    return {name for name in sys.modules if name.startswith("mine_")}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("allowed", ["mine_nets", "mine_nets.small"])
def test_a_function_of_an_allowed_module_or_of_one_below_it_is_loaded(allowed: str) -> None:
    assert load("mine_nets.small:double", ("elsewhere", allowed), "model.name")(4) == 8
    assert load("mine_nets.small:Net", [allowed], "model.name")(5).size == 5


@pytest.mark.parametrize(
    "allowed", [(), ("mine_net",), ("mine_nets.smal",), ("mine_nets.small.more",), ("mine",), ("",)]
)
def test_what_is_not_allowed_is_refused_and_not_imported(allowed: tuple[str, ...]) -> None:
    assert refusal(lambda: load("mine_nets.small:double", allowed, "model.name")) == (
        "model.name = 'mine_nets.small:double' would import mine_nets.small, which this peer was not started with: "
        "if you trust that code, start the peer with --allow mine_nets.small (in Python, allow=['mine_nets.small'])."
    )
    assert loaded() == set()


def test_to_allow_a_package_allows_no_package_whose_name_begins_so() -> None:
    assert "would import mine_netsafe" in refusal(lambda: load("mine_netsafe:other", ["mine_nets"], "data.name"))
    assert loaded() == set()


@pytest.mark.parametrize(
    ("name", "home"), [("join", "posixpath" if sys.platform != "win32" else "ntpath"), ("other", "mine_netsafe")]
)
def test_what_an_allowed_module_only_passes_on_is_refused(name: str, home: str) -> None:
    assert refusal(lambda: load(f"mine_nets.small:{name}", ["mine_nets"], "data.name")) == (
        f"data.name = 'mine_nets.small:{name}' is code of {home}, which this peer was not started with: "
        f"if you trust that code, start the peer with --allow {home} (in Python, allow=[{home!r}])."
    )


@pytest.mark.parametrize(
    "spec", ["mine_nets.small", "mine_nets.small:", ":double", "mine_nets:small.double", "mine_nets..small:double",
             "mine_nets/small:double", "mine_nets.small:double:more", "a b:c"]
)  # fmt: skip
def test_what_is_no_function_s_name_is_refused(spec: str) -> None:
    assert refusal(lambda: load(spec, ["mine_nets"], "model.name")) == (
        f"model.name = {spec!r} names no function: write it as package.module:function."
    )
    assert loaded() == set()


@pytest.mark.parametrize("name", ["triple", "number"])
def test_what_the_module_does_not_have_or_cannot_be_called_is_refused(name: str) -> None:
    assert refusal(lambda: load(f"mine_nets.small:{name}", ["mine_nets"], "model.name")) == (
        f"model.name = 'mine_nets.small:{name}': mine_nets.small has no function {name}: "
        "define it at the module's top level."
    )


@pytest.mark.parametrize(
    ("module", "missing"),
    [("mine_none", "mine_none"), ("mine_nets.large", "mine_nets.large"), ("mine_none.a", "mine_none")],
)
def test_a_module_that_is_not_there_is_refused(module: str, missing: str) -> None:
    assert refusal(lambda: load(f"{module}:f", [module], "model.name")) == (
        f"model.name = '{module}:f': there is no module {missing} here: install it, or start this peer in its folder."
    )


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("mine_broken", "ModuleNotFoundError (No module named 'mine_nowhere')"),
        ("mine_wrong", "ZeroDivisionError (division by zero)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_the_reason(module: str, why: str) -> None:
    assert refusal(lambda: load(f"{module}:f", [module], "model.name")) == (
        f"model.name = '{module}:f': importing {module} failed with {why}: mend that module."
    )


def test_what_the_function_makes_is_checked() -> None:
    assert make("mine_nets.small:double", ["mine_nets"], "model.name", int, 21) == 42
    assert refusal(lambda: make("mine_nets.small:double", ["mine_nets"], "model.name", int, "a")) == (
        "model.name = 'mine_nets.small:double' gave a str: it has to return a int."
    )


def test_a_function_that_fails_is_refused_with_the_reason() -> None:
    assert refusal(lambda: make("mine_nets.small:fail", ["mine_nets"], "model.name", int, 1)) == (
        "model.name = 'mine_nets.small:fail' failed with ValueError (no way): mend that function."
    )
    with pytest.raises(DataError, match=r"No such set: make one\."):
        make("mine_nets.small:refuse", ["mine_nets"], "model.name", int, 1)
