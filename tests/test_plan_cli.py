"""`zsplit plan` and `zsplit profile`: on what a run kept, and on this machine."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Ending
from msgspec.structs import replace
from rich.console import Console
from situations import CUTS, a_client, a_link, a_profile, a_situation

from zsplit.errors import ConfigError
from zsplit.monitor.plans import profile as profile_tables
from zsplit.plan import Decision, Situation, decide, explain
from zsplit.plan.file import read_situation

Here = Callable[..., Ending]

BRIEF = ("--set", "plan.profile_seconds=0.2", "--set", "plan.profile_steps=1", "--set", "schedule.clients=2")
"""Measure little: what is found is not looked at."""


def kept(folder: Path, situation: Situation) -> Situation:
    """Keep a situation as a run does; return it."""
    (folder / "run").mkdir()
    (folder / "run" / "profile.json").write_bytes(msgspec.json.encode(situation))
    return situation


@pytest.fixture
def two(tmp_path: Path) -> Situation:
    """A run's situation: two clients with different links."""
    normed = a_profile(batch_norm=True)
    return kept(tmp_path, a_situation(a_client(0, normed, a_link(0.5, rtt=0.02)), a_client(1, normed, a_link(400))))


# zsplit plan


def test_plan_prints_the_decision_as_json(two: Situation, here: Here) -> None:
    code, out, err = here("plan", "run", "--json")
    decision = decide(two, full=True)
    answer: dict[str, Any] = json.loads(out)
    assert (code, err) == (0, "")
    assert answer.pop("why") == explain(decision)
    assert msgspec.convert(answer, Decision, str_keys=True, strict=False) == decision


def test_plan_takes_the_file_as_well_as_the_folder(two: Situation, here: Here) -> None:
    assert here("plan", "run/profile.json", "--json") == here("plan", "run", "--json")


def test_plan_prints_a_table_for_each_plan_the_chosen_first_and_then_why(two: Situation, here: Here) -> None:
    code, out, err = here("plan", "run")
    decision = decide(two, full=True)
    assert (code, err, len(decision.alike())) == (0, "", 2)
    rows = [line.split() for line in out.splitlines()]
    heads = [number for number, row in enumerate(rows) if row[:3] == ["cut", "M", "step"]]
    chosen = [rows[number + 2][:2] for number in heads]
    assert chosen == [[plan.cut, str(plan.micro_batches)] for plan in decision.plans.values()]
    assert rows[heads[0]][3:] == ["client", "uplink", "server", "downlink", "turn"]
    assert all(sum(cell == "%" for cell in rows[number + 2]) == 4 for number in heads)
    assert "".join(out.split()).endswith("".join("".join(explain(decision)).split()))


def test_plan_shows_all_candidates_and_what_was_excluded_when_asked(here: Here, tmp_path: Path) -> None:
    little = a_profile((0.1, 0.1, 0.1, 0.1), note="Out of memory: 'block.fc2' is the last cut whose front fits.")
    kept(tmp_path, a_situation(a_client(profile=little, batch=8), client_memory_mb=10))
    few, everything = here("plan", "run").out, here("plan", "run", "--all").out
    assert "4 more: --all shows them" in few
    assert "--all" not in everything
    assert sum(line.strip().startswith(CUTS) for line in everything.splitlines()) == 16


def test_plan_says_why_a_cut_is_excluded(here: Here, tmp_path: Path) -> None:
    kept(tmp_path, a_situation(a_client(profile=a_profile((0.1, 0.1), note="Out of memory."))))
    assert "2 excluded: --all shows them" in here("plan", "run").out
    shown = here("plan", "run", "--all").out
    assert "excluded: 'block.fc1' (client 0 ran out of memory there)" in shown
    assert "Client 0 ran out of memory on the way to 'block.fc1', so no cut from there on is planned." in shown


def test_plan_frees_what_the_config_fixed_unless_it_is_to_keep_it(here: Here, tmp_path: Path) -> None:
    kept(tmp_path, a_situation(cut="conv1", micro_batches=2))
    free, fixed = (json.loads(here("plan", "run", "--json", *options).out) for options in ((), ("--fixed",)))
    assert {each["cut"] for each in free["ranking"]} == set(CUTS)
    assert [(each["cut"], each["micro_batches"]) for each in fixed["ranking"]] == [("conv1", 2)]


def test_plan_answers_what_if(two: Situation, here: Here) -> None:
    slow = json.loads(here("plan", "run", "--json", "--uplink", "0.1", "--downlink", "0.1", "--rtt", "50").out)
    assert {plan["cut"] for plan in slow["plans"].values()} == {CUTS[-1]}
    many = json.loads(here("plan", "run", "--json", "--clients", "3").out)
    assert list(many["plans"]) == ["0", "1", "2"]


def test_plan_measures_this_machine_for_a_config_and_says_what_it_assumes(here: Here, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[model]\nname = "splitnn/mlp"\n[train]\nbatch_size = 16\n')
    code, out, err = here("plan", "own.toml", "--json", "--apart", *BRIEF)
    assert code == 0
    assert list(json.loads(out)["plans"]) == ["0", "1"]
    assert err.splitlines() == [
        "The config does not limit the link: 8000 Mbit/s and a round trip of 0.5 ms are assumed where it does not; "
        "--uplink, --downlink and --rtt say otherwise.",
        "Measuring this machine for splitnn/mlp, about 0.4 s …",
    ]


def test_plan_takes_the_links_of_the_config(here: Here) -> None:
    slow = "--set", "link.uplink_mbps=0.2", "--set", "link.downlink_mbps=0.2"
    code, out, err = here("plan", "--json", *BRIEF, *slow)
    assert (code, "assumed" in err) == (0, False)
    first = json.loads(out)["ranking"][0]["forecasts"]["0"]
    assert first["bottleneck"] in ("uplink", "downlink")


# zsplit profile


def test_profile_prints_a_peer_as_json(two: Situation, here: Here) -> None:
    code, out, err = here("profile", "run", "--json", "-i", "1")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(msgspec.json.encode(two.clients[1]))
    assert json.loads(here("profile", "run", "--json").out)["client"] == 0
    assert json.loads(here("profile", "run", "--json", "--server", "0").out)["server"] == 0


def test_profile_prints_every_stretch_with_its_seconds_at_every_size(two: Situation, here: Here) -> None:
    code, out, err = here("profile", "run")
    assert (code, err) == (0, "")
    assert "Client 0: a host of its own, 1 core, computes on cpu with 1 thread" in out
    assert "link 0.5 Mbit/s up, 0.5 Mbit/s down, round trip 20 ms, rates vary by 0 %" in out
    assert "10 steps a round, 32 samples a mini-batch, which takes 0 ms to load" in out
    assert "the model has BatchNorm" in out
    rows = [line.split() for line in out.splitlines()]
    head = next(number for number, row in enumerate(rows) if row[:2] == ["up", "to"])
    assert rows[head][2:6] == ["1", "4", "16", "32"]
    first = rows.index(next(row for row in rows[head:] if row[:1] == ["conv1"]))
    assert rows[first][1:5] == ["3.12", "12.5", "50", "100"]
    assert rows[first + 1][:4] == ["6.25", "25", "100", "200"]
    assert [row[0] for row in rows[first::2] if row][:5] == [*CUTS, "loss"]


def test_the_tables_of_a_profile_fit_80_cells_with_every_figure_whole() -> None:
    seconds = (1.23456789e-6, 1.23456789e-3, 0.123456789, 1.23456789, 1.23456789)
    wide = a_profile(seconds, (123456.0,) * 4, weights=1e9, saved=123456)
    sizes = (1, 2, 4, 8, 16, 32, 100)
    forward = [
        replace(each, forward=each.forward[-1:] * len(sizes), backward=each.backward[-1:] * len(sizes))
        for each in wide.stretches
    ]
    measured = replace(wide, cuts=tuple(f"layer{n}.0.relu_1" for n in range(4)), sizes=sizes, stretches=tuple(forward))
    console = Console(width=80, file=StringIO())
    with console.capture() as capture:
        for part in profile_tables(a_client(profile=measured, link=a_link(1690))):
            console.print(part)
    out = capture.get()
    assert "…" not in out
    assert "e+" not in out
    assert "link 1,690 Mbit/s up" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["layer0.0.relu_1", *["0.001"] * len(sizes), "0.000"] in rows
    assert ["layer1.0.relu_1", *["1.23"] * len(sizes), "0.000"] in rows
    assert ["layer3.0.relu_1", *["1,235"] * len(sizes), "0.000"] in rows
    assert ["loss", "1.0", "GB", "123", "kB"] in rows


def test_profile_of_a_server_has_no_link(two: Situation, here: Here) -> None:
    out = here("profile", "run", "--server", "0").out
    assert out.startswith("Server 0: ")
    assert "Mbit/s" not in out


def test_profile_measures_this_machine_for_a_config(here: Here) -> None:
    code, out, _ = here("profile", "--json", *BRIEF)
    site = json.loads(out)
    assert (code, site["client"], site["batch"]) == (0, 0, 32)
    assert site["machine"]["host"] == "this machine"
    assert len(site["profile"]["stretches"]) == len(site["profile"]["cuts"]) + 1


# What cannot be


WRONG = {
    "plan nowhere.json": "There is no nowhere.json: a run writes it when it plans, with model.cut or "
    "train.micro_batches auto, or with plan.predict = true.",
    "plan empty": "There is no empty/profile.json: a run writes it when it plans, with model.cut or "
    "train.micro_batches auto, or with plan.predict = true.",
    "plan none.toml": "There is no config file none.toml: check the path, or leave it out for the demo.",
    "plan broken.json": "broken.json is no profile of this version (Object missing required field `policy`): "
    "name a run's folder.",
    "plan nobody.json": "nobody.json holds no client or no server: name the folder of a run that has planned.",
    "plan run --apart": "--set and --apart are for a config: a run's profile stays as it was measured.",
    "plan run --uplink 0": "Invalid value for '--uplink': 0.0 is not in the range x>0.",
    "profile run -i 7": "There is no profile of client 7: there are 0, 1.",
    "profile run --server 1": "There is no profile of server 1: there are 0.",
    "profile run -i 0 --server 0": "A profile is one peer's: give --index or --server, not both.",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_be_is_a_sentence_and_exit_code_two(
    arguments: str, two: Situation, here: Here, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "nobody.json").write_bytes(msgspec.json.encode(Situation("parallel", (), ())))
    code, out, err = here(*arguments.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(WRONG[arguments])


def test_a_profile_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "profile.json").mkdir()
    with pytest.raises(ConfigError, match=r"profile\.json cannot be read \(Is a directory\): name a run's folder\."):
        read_situation(tmp_path)
