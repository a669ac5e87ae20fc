"""What the pages show exists: links, commands, keys, packages. `python tests/test_readme.py` writes lists anew."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import zsplit
from zsplit.cli import cli
from zsplit.config import keys, load_config
from zsplit.train import schedule
from zsplit_broker.policy import picture, stages_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy/README.md", ROOT / "broker/README.md"])
SOURCES = sorted([*ROOT.glob("zsplit/**/*.py"), *ROOT.glob("broker/zsplit_broker/*.py")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks in a language, or without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [body for found, body in fences if found == language]


def shown(page: Path, program: str) -> list[list[str]]:
    """Return the arguments of every line of a fenced block that starts a program."""
    lines = (line for block in blocks(page, "") for line in block.splitlines())
    words = (shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} "))
    return [arguments for _, *arguments in words]


def inline(page: Path) -> list[str]:
    """Return what stands in backticks within the prose."""
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def parsed(arguments: list[str]) -> click.Context:
    """Parse a command as the program does, without running it. Raises ClickException where it would be refused."""
    name, *rest = arguments
    return cli.commands[name].make_context(name, rest)


def options() -> set[str]:
    """Return every option of the command line."""
    parameters = [*cli.params, *(parameter for command in cli.commands.values() for parameter in command.params)]
    return {"--help", "--version"} | {option for parameter in parameters for option in parameter.opts}


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Links and keys


@every_page
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text_of(page)):
        if target.startswith(("https:", "http:")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


@every_page
def test_every_key_that_is_named_is_a_key_of_the_config(page: Path) -> None:
    known = {key.key for key in keys()}
    sections = {key.partition(".")[0] for key in known}
    files = (".safetensors", ".json", ".jsonl", ".toml", ".log", ".py", ".md")
    for code in inline(page):
        key = code.partition(" = ")[0]
        if re.fullmatch(r"[a-z]+\.[a-z_]+", key) and key.partition(".")[0] in sections and not key.endswith(files):
            assert key in known, f"{page.name} names {key}"


# Commands


@pytest.mark.parametrize("page", [README, ROOT / "deploy/README.md"], ids=["README", "deploy"])
def test_every_command_that_is_shown_is_accepted(page: Path) -> None:
    commands = shown(page, "zsplit")
    assert commands
    for arguments in commands:
        context = parsed(arguments)
        load_config(None, context.params.get("overrides", ()))


@every_page
def test_every_command_and_option_in_the_prose_exists(page: Path) -> None:
    for code in inline(page):
        words = code.removeprefix(".venv/bin/").split()
        if words[0] == "zsplit" and len(words) > 1:
            assert words[1] in cli.commands, f"{page.name} names `{code}`"
        elif words[0].startswith("--") and len(words[0]) > 2:
            assert words[0] in options(), f"{page.name} names `{code}`"


def test_a_folder_that_a_command_reads_is_one_that_another_has_made_before() -> None:
    made: set[str] = set()
    for arguments in shown(README, "zsplit"):
        out = str(parsed(arguments).params.get("out"))
        for folder in re.findall(r"\b[a-z-]+-(?:run|sweep)\b", " ".join(arguments)):
            assert (folder in made) == (folder != out), f"zsplit {shlex.join(arguments)}"
            made.add(folder)
    assert made


def test_a_config_that_a_command_names_is_in_the_repository() -> None:
    for arguments in shown(README, "zsplit"):
        config = parsed(arguments).params.get("config")
        assert config is None or (ROOT / config).is_file()


@every_page
def test_every_make_target_that_is_shown_is_in_the_makefile(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    named = [words[0] for words in shown(page, "make")] + [
        code.split()[1] for code in inline(page) if code.startswith("make ")
    ]
    assert set(named) <= set(targets)


# Python and the run's folder


def test_the_readme_s_python_runs_as_printed_and_leaves_the_files_it_lists(tmp_path: Path) -> None:
    (code,) = blocks(README, "python")
    assert '"run.rounds": 3}' in code
    script = tmp_path / "script.py"
    script.write_text(code.replace('"run.rounds": 3}', '"run.rounds": 3, "broker.port": 0}'), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("the run is finished ")
    listed = re.findall(r"^\| `([\w./]+)` \|", text_of(README), re.MULTILINE)
    assert sorted(listed) == sorted(path.name + "/" * path.is_dir() for path in (tmp_path / "points-run").iterdir())


def test_the_example_trains(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_model.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cuts, ending = done.stdout.splitlines()[:4], done.stdout.splitlines()[-1]
    assert cuts == ["0 hidden.0 (64,)", "1 hidden.1 (64,)", "2 hidden.2 (64,)", "3 hidden.3 (64,)"]
    said = re.fullmatch(r"the run is finished ([\d.]+) runs/spirals-1", ending)
    assert said, ending
    assert float(said[1]) > 0.9  # a third by chance
    assert (tmp_path / "runs/spirals-1/model.safetensors").is_file()


def test_names_of_the_python_interface_in_the_pages_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"\bzsplit\.([a-z_]+)\(", text_of(page))}
    assert named
    assert named <= set(zsplit.__all__)


# Lists that have their source elsewhere


def test_the_dependency_table_is_that_of_the_project() -> None:
    section = text_of(README).partition("## Dependencies")[2].partition("\n## ")[0]
    required = [re.split(r"[^\w-]", line)[0] for line in PROJECT["project"]["dependencies"]]
    assert re.findall(r"^\| ([\w-]+) \| ", section, re.MULTILINE)[1:] == sorted(required)
    for line in PROJECT["project"]["optional-dependencies"]["dev"]:
        assert re.split(r"[^\w-]", line)[0] in section


def test_every_purpose_of_a_seed_is_in_the_architecture() -> None:
    used = {purpose for path in SOURCES for purpose in re.findall(r'\bderive\([^"]*?"(\w+)"', text_of(path))}
    dealt = (text_of(path) for path in (ROOT / "zsplit/data").glob("*.py"))
    used |= {purpose for text in dealt for purpose in re.findall(r'\bpermutation\([^"]*?"(\w+)"', text)}
    section = text_of(ARCHITECTURE).partition("## 9.")[2].partition("## 10.")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == used


def test_the_changelog_speaks_of_the_project_s_version() -> None:
    assert PROJECT["project"]["version"] in text_of(ROOT / "CHANGELOG.md")


def floors() -> str:
    """Return the layers that import-linter checks, highest first."""
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return "```\n" + "\n".join(layers) + "\n```\n"


def rooms() -> str:
    """Return every file that has a docstring, and the first line of it."""
    about = {path.relative_to(ROOT): ast.get_docstring(ast.parse(text_of(path))) for path in SOURCES}
    rows = [f"| `{path}` | {doc.splitlines()[0]} |\n" for path, doc in about.items() if doc]
    return "| file | what it is |\n|---|---|\n" + "".join(rows)


def stages() -> str:
    """Return a round of three clients as each policy makes it."""
    policies = ({"schedule.policy": "round_robin"}, {"schedule.aggregate_every": 2})
    configs = (load_config(None, {"schedule.clients": 3, **policy}) for policy in policies)
    pictures = (picture(stages_of(config, [0, 1, 2], {0: 5, 1: 5, 2: 4})) for config in configs)
    return "```\n" + "\n\n".join(pictures) + "\n```\n"


def pipeline() -> str:
    """Return a step of four micro-batches on a link that is slower than either side computes."""
    return "```\n" + schedule.picture(schedule.order(4, 3), schedule.Slots(uplink=2, downlink=2)) + "\n```\n"


GENERATED: dict[str, Callable[[], str]] = {"floors": floors, "rooms": rooms, "stages": stages, "pipeline": pipeline}


def parts(page: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every part between markers."""
    yield from re.findall(r"<!-- (\w+): begin -->\n(.*?)<!-- \1: end -->", page, re.DOTALL)


@pytest.mark.parametrize("name", GENERATED)
def test_the_lists_of_the_architecture_are_those_of_the_code(name: str) -> None:
    said = dict(parts(text_of(ARCHITECTURE)))[name]
    assert said == GENERATED[name](), "run `python tests/test_readme.py` to write them anew"


if __name__ == "__main__":
    page = text_of(ARCHITECTURE)
    for name, make in GENERATED.items():
        page = re.sub(
            f"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)",
            lambda found, make=make: found[1] + make() + found[2],
            page,
            flags=re.DOTALL,
        )
    ARCHITECTURE.write_text(page, encoding="utf-8")
