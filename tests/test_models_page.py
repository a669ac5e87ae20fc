"""The page on models and the code say the same. `python tests/test_models_page.py` writes its tables anew."""

import re
from pathlib import Path

import pytest
import torch

from zsplit.model import kinds, trace, zoo

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

SOURCES = {
    "digits": "zsplit's demo",
    "splitnn": "PySyft's SplitNN tutorial",
    "tutorial": "split-learning tutorial",
    "pipelearn": "PipeLearn",
    "ms": "MaskSparsification",
}

CLASSES = {"ms/resnet18": 100, "ms/resnet34": 1000}
"""Where the source does not have ten."""


def models() -> str:
    """Return the table of the models that have a name of ours."""
    rows = ["| name | source | input | classes there | parameters | usual cut |", "|---|---|---|---|---|---|"]
    for name, entry in zoo.OWN.items():
        classes = CLASSES.get(name, 10)
        with torch.device("meta"):
            model = zoo.build(name, classes, 0, entry.input)
        count = sum(parameter.numel() for parameter in model.parameters())
        shape = "×".join(map(str, entry.input))
        source = SOURCES[name.partition("/")[0]]
        rows.append(f"| `{name}` | {source} | {shape} | {classes} | {count:,} | `{entry.cut}` |")
    return "\n".join(rows) + "\n"


def ms() -> str:
    """Return the table of MaskSparsification's cuts."""
    rows = ["| model | `ms:shallow` | `ms:medium` | `ms:deep` |", "|---|---|---|---|"]
    for name in kinds.MS:
        shape = zoo.default_input(name)
        with torch.device("meta"):
            traced = trace(zoo.build(name, 10, 0, shape), torch.zeros(2, *shape))
        cuts = [traced.cut(f"ms:{depth}") for depth in ("shallow", "medium", "deep")]
        rows.append(f"| `{name}` | " + " | ".join(f"`{c.name}`, {'×'.join(map(str, c.shape))}" for c in cuts) + " |")
    return "\n".join(rows) + "\n"


TABLES = {"models": models, "ms": ms}


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: begin -->\n)(.*?)(<!-- {name}: end -->)", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_on_the_page_are_those_of_the_code(name: str) -> None:
    found = block(name).search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == TABLES[name](), "run `python tests/test_models_page.py` to write them anew"


def test_the_page_names_every_kind_of_cut() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+):\w+` \|", text, re.MULTILINE)) == set(kinds.KINDS)


def main() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = block(name).sub(lambda found, table=table: found[1] + table() + found[3], text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
