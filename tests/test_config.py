"""The run config: what is read, what is refused and in which words."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsplit.config import Config, differences, from_json, keys, link_of, load_config, table, to_json, to_toml
from zsplit.config.shape import COLUMNS, ClientShape, Row, read_trace
from zsplit.errors import ConfigError

ROOT = Path(__file__).parents[1]

legal_overrides = st.fixed_dictionaries(
    {},
    optional={
        "run.name": st.from_regex(r"\A[a-z][a-z0-9_.-]{0,9}\Z"),
        "run.seed": st.integers(0, 2**62),
        "run.out": st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])),
        "run.deterministic": st.booleans(),
        "model.cut": st.integers(0, 99) | st.text("abc.3_", max_size=9),
        "model.input": st.lists(st.integers(1, 512), max_size=3),
        "train.lr": st.floats(0, 1e6),
        "train.client_lr": st.none() | st.floats(0, 1),
        "train.optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
        "schedule.clients": st.integers(1, 1000),
    },
)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def refusal_of_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).replace(str(path), "run.toml")


class TestWhatIsRead:
    def test_no_file_and_no_overrides_are_the_defaults(self) -> None:
        assert load_config() == Config()

    def test_a_file_sets_keys_and_overrides_go_on_top(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text('[train]\nlr = 1\nbatch_size = 8\n[model]\nname = "resnet18"\ninput = [3, 32, 32]\n')
        config = load_config(path, ["train.batch_size=16", "schedule.policy = round_robin"])
        assert (config.train.lr, config.train.batch_size) == (1.0, 16)
        assert isinstance(config.train.lr, float)
        assert (config.model.name, config.model.input) == ("resnet18", (3, 32, 32))
        assert config.schedule.policy == "round_robin"

    def test_the_demos_file_says_what_the_defaults_are(self) -> None:
        assert load_config(ROOT / "configs" / "digits.toml") == Config()

    def test_an_override_is_toml_or_bare_text(self) -> None:
        texts = ["train.lr=1e-3", "model.cut=3", "run.out=a=b", 'data.path="~/x y"', "run.deterministic=true"]
        config = load_config(None, texts)
        assert config.train.lr == 0.001
        assert (config.model.cut, config.run.out, config.data.path) == (3, "a=b", "~/x y")
        assert config.run.deterministic is True

    def test_a_key_that_takes_only_text_takes_digits_as_text(self) -> None:
        assert load_config(None, ["run.name=2024"]).run.name == "2024"

    def test_overrides_may_be_a_mapping(self) -> None:
        assert load_config(None, {"schedule.clients": 7}).schedule.clients == 7

    def test_a_cut_is_a_name_or_an_index(self) -> None:
        assert load_config(None, ["model.cut=layer1.0.relu_1"]).model.cut == "layer1.0.relu_1"
        assert load_config(None, ["model.cut=12"]).model.cut == 12

    def test_an_unset_learning_rate_of_one_side_is_the_common_one(self) -> None:
        train = load_config(None, ["train.lr=0.5", "train.server_lr=0"]).train
        assert (train.client_rate, train.server_rate) == (0.5, 0.0)
        train = load_config(None, ["train.client_lr=0.25"]).train
        assert (train.client_rate, train.server_rate) == (0.25, train.lr)

    def test_momentum_is_sgds_and_otherwise_zero_when_unset(self) -> None:
        assert load_config(None, ["train.optimizer=adam"]).train.momentum == 0.0
        assert load_config(None, ["train.optimizer=sgd"]).train.momentum == 0.9

    @given(legal_overrides)
    def test_toml_and_json_both_bring_the_same_config_back(self, overrides: dict[str, object]) -> None:
        config = load_config(None, overrides)
        flat = {f"{s}.{k}": v for s, keys in tomllib.loads(to_toml(config)).items() for k, v in keys.items()}
        assert load_config(None, flat) == config
        assert from_json(to_json(config)) == config

    def test_clients_links_are_tables_whose_unset_keys_stay_unset(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text('[link]\nrtt_ms = 5\n[[link.client]]\nclients = "1-2"\nuplink_mbps = 3\n')
        config = load_config(path)
        assert [(each.uplink_mbps, each.rtt_ms) for each in config.link.client] == [(3.0, None)]
        path.write_text(to_toml(config))
        assert load_config(path) == config == from_json(to_json(config))

    def test_clients_links_can_be_set_as_one_key(self) -> None:
        config = load_config(None, ['link.client=[{clients = "0", rtt_ms = 7}, {clients = "*", trace = "a.csv"}]'])
        assert [each.clients for each in config.link.client] == ["0", "*"]

    def test_differences_names_the_keys_that_differ(self) -> None:
        other = load_config(None, ["train.lr=1", "run.seed=3"])
        assert differences(Config(), other) == ["run.seed", "train.lr"]
        assert differences(other, other) == []

    def test_the_config_loads_no_torch_and_no_zmq(self) -> None:
        code = "import sys, zsplit.config; print({'torch', 'zmq', 'numpy'} & set(sys.modules))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "set()"


class TestRefusedKeys:
    def test_a_misspelt_key_names_the_nearest(self) -> None:
        assert refusal("train.batchsize=3") == (
            "train.batchsize is not a key of the config: the nearest is train.batch_size."
        )

    def test_a_key_in_the_wrong_section_names_the_right_one(self) -> None:
        assert refusal("client.lr=3") == "client.lr is not a key of the config: the nearest is train.lr."

    def test_a_key_like_no_other_lists_its_section(self) -> None:
        sentence = "codec.zzzzzzzz is not a key of the config: [codec] has up, down, eval, weights."
        assert refusal("codec.zzzzzzzz=3") == sentence

    def test_a_key_outside_of_all_sections_names_where_it_stands(self, tmp_path: Path) -> None:
        sentence = refusal_of_file(tmp_path, "rounds = 3\n")
        assert sentence == "rounds is not a key of the config: the nearest is run.rounds."

    def test_a_section_set_like_a_key_lists_its_keys(self) -> None:
        sentence = refusal("codec=raw")
        assert sentence == "codec is not a key of the config: it is a section, with the keys up, down, eval, weights."

    def test_a_misspelt_section_names_the_nearest(self, tmp_path: Path) -> None:
        sentence = refusal_of_file(tmp_path, "[shedule]\n")
        assert sentence == "[shedule] is not a section of the config: the nearest is [schedule]."

    def test_a_section_like_no_other_lists_all(self, tmp_path: Path) -> None:
        assert "there are [run], [model], [data]" in refusal_of_file(tmp_path, "[xyz]\n")
        assert "there are [run], [model], [data]" in refusal("xyz.uvw=3")

    def test_an_override_without_a_value_shows_how_to_write_it(self) -> None:
        assert refusal("train.lr") == ("`train.lr` sets no key: write section.key=value, such as train.lr=0.05.")


class TestRefusedValues:
    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("train.batch_size=0", "train.batch_size must be an integer ≥ 1, not 0."),
            ("train.batch_size=1.5", "train.batch_size must be an integer ≥ 1, not 1.5."),
            ("train.batch_size=true", "train.batch_size must be an integer ≥ 1, not true."),
            ("train.lr=fast", 'train.lr must be a number ≥ 0, not "fast".'),
            ("train.lr=.05", 'train.lr must be a number ≥ 0, not ".05": write 0.05.'),
            ('train.batch_size="8"', 'train.batch_size must be an integer ≥ 1, not "8": write 8.'),
            ("train.lr=nan", "train.lr must be a number ≥ 0, not NaN."),
            ("train.lr=inf", "train.lr must be a number ≥ 0, not Infinity."),
            ("data.val_fraction=1", "data.val_fraction must be a number ≥ 0 and < 1, not 1."),
            ("data.val_fraction=-0.1", "data.val_fraction must be a number ≥ 0 and < 1, not -0.1."),
            ("run.deterministic=yes", 'run.deterministic must be true or false, not "yes".'),
            ("run.seed=1979-05-27", 'run.seed must be an integer ≥ 0, not "1979-05-27".'),
            ("run.name=a/b", 'run.name must be a name of letters, digits, `_`, `-` and `.`, not "a/b".'),
            ("model.cut=-1", "model.cut must be text or integer ≥ 0, not -1."),
            ("model.input=[3, 0]", "model.input must be a list, each integer ≥ 1, not [3, 0]."),
            ("broker.port=70000", "broker.port must be an integer ≥ 0 and ≤ 65535, not 70000."),
            (
                "client.device=gpu",
                'client.device must be "auto" or "cpu" or "mps" or "cuda" or "cuda:N", not "gpu".',
            ),
            (
                "schedule.policy=roundrobin",
                'schedule.policy must be "async" or "parallel" or "round_robin", not "roundrobin": '
                'the nearest is "round_robin".',
            ),
            ("train.micro_batches=0", 'train.micro_batches must be an integer ≥ 1 or "auto", not 0.'),
            (
                "train.micro_batches=atuo",
                'train.micro_batches must be an integer ≥ 1 or "auto", not "atuo": the nearest is "auto".',
            ),
            (
                'train.micro_batches="8"',
                'train.micro_batches must be an integer ≥ 1 or "auto", not "8": write 8.',
            ),
            (
                "link.client=5",
                "link.client must be a list of tables with clients, uplink_mbps, downlink_mbps, rtt_ms, trace, not 5.",
            ),
            (
                "link.client=[5]",
                "link.client must be a list of tables with clients, uplink_mbps, downlink_mbps, rtt_ms, trace, not 5.",
            ),
            (
                'link.client=[{clients = "0", uplink_mbit = 5}]',
                "uplink_mbit is not a key of [[link.client]]: the nearest is uplink_mbps.",
            ),
            (
                'link.client=[{clients = "0", colour = 5}]',
                "colour is not a key of [[link.client]]: it has clients, uplink_mbps, downlink_mbps, rtt_ms, trace.",
            ),
            (
                "link.client=[{rtt_ms = 5}]",
                "A [[link.client]] table lacks clients: give it a list of clients such as `0`, `1-3`, `0,4-6` or `*`.",
            ),
            (
                'link.client=[{clients = "a"}]',
                'link.client.clients must be a list of clients such as `0`, `1-3`, `0,4-6` or `*`, not "a".',
            ),
            (
                'link.client=[{clients = "0", rtt_ms = -1}]',
                "link.client.rtt_ms must be a number ≥ 0, not -1.",
            ),
            (
                'link.client=[{clients = "0", rtt_ms = inf}]',
                "link.client.rtt_ms must be a number ≥ 0, not Infinity.",
            ),
            ("codec.up=rwa", 'codec.up = "rwa" is wrong at character 1: "rwa" is not a codec, the nearest is raw.'),
        ],
    )
    def test_it_names_key_expected_and_found(self, override: str, sentence: str) -> None:
        assert refusal(override) == sentence

    def test_an_unknown_dataset_names_the_nearest(self) -> None:
        assert refusal("data.name=digit") == ('data.name = "digit" does not exist: the nearest is "digits".')

    def test_a_config_made_in_python_is_checked_as_well(self) -> None:
        section = type(Config().train)(batch_size=-1)
        with pytest.raises(ConfigError, match=r"train\.batch_size must be an integer ≥ 1, not -1"):
            Config(train=section)


class TestRefusedCombinations:
    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            (
                ["codec.up=mask"],
                'codec.up = "mask" cannot be, since smashed data answer nothing that has kept places: '
                "mask is for codec.down, set topk, randtopk or ms here.",
            ),
            (
                ["codec.up=half", "codec.down=mask+half"],
                'codec.down = "mask+half" needs places that codec.up has kept, and codec.up = "half" keeps all: '
                "set codec.up to topk, randtopk or ms, or codec.down to something else.",
            ),
            (
                ["codec.up=ms:ratio=0.99,bits=2", "codec.down=ms:ratio=0.99,bits=9"],
                'codec.down = "ms:ratio=0.99,bits=9" is wrong at character 20: '
                'bits must be a whole number from 1 to 8, not "9".',
            ),
            (
                ["link.beat_seconds=5"],
                "link.beat_seconds = 5.0 is too long for link.lease_seconds = 10.0, "
                "where a late beat ends the lease: set it below 5.0.",
            ),
            (
                ["link.progress_seconds=0.5"],
                "link.progress_seconds = 0.5 is too short, since beats carry the progress: "
                "set it above link.beat_seconds = 1.0, or to 0.",
            ),
            (
                ["schedule.clients_per_round=5"],
                "schedule.clients_per_round = 5 is more than there are: with schedule.clients = 4 the largest is 4.",
            ),
            (
                ["schedule.min_clients=5"],
                "schedule.min_clients = 5 is more than a round has: it has 4 clients, "
                "set schedule.min_clients to 4 or less.",
            ),
            (
                ["schedule.aggregate_every=0"],
                "schedule.aggregate_every = 0 is no number of steps: "
                "set 1 or more, or -1 for the end of the local epochs.",
            ),
            (
                ["schedule.aggregate_every=3", "schedule.policy=round_robin"],
                'schedule.aggregate_every = 3 means nothing under schedule.policy = "round_robin": '
                'leave it out, or set schedule.policy = "parallel".',
            ),
            (
                ["run.commit_every=2"],
                'run.commit_every = 2 means nothing under schedule.policy = "parallel": '
                'leave it out, or set schedule.policy = "round_robin".',
            ),
            (
                ["train.optimizer=adam", "train.momentum=0.5"],
                'train.momentum = 0.5 means nothing under train.optimizer = "adam": '
                'leave it out, or set train.optimizer = "sgd".',
            ),
            (
                ["train.nesterov=true", "train.momentum=0"],
                'train.nesterov = true needs train.optimizer = "sgd" and train.momentum above 0: '
                "set both, or leave it out.",
            ),
            (
                ["train.micro_batches=33"],
                "train.micro_batches = 33 would leave slices without a sample: "
                "with train.batch_size = 32 the largest is 32.",
            ),
            (
                ["link.trace=home.csv", "link.downlink_mbps=5"],
                'link.trace = "home.csv" says the rates over time: leave it out, or uplink_mbps and downlink_mbps.',
            ),
            (
                ['link.client=[{clients = "1", trace = "home.csv", uplink_mbps = 5}]'],
                'The [[link.client]] table of clients = "1" sets trace, which says the rates over time: '
                "leave it out, or uplink_mbps and downlink_mbps.",
            ),
            (
                ['link.client=[{clients = "*", rtt_ms = 1}, {clients = "0,2-4"}]'],
                'The [[link.client]] table of clients = "0,2-4" names client 4: '
                "with schedule.clients = 4 the last one is 3.",
            ),
            (
                ['link.client=[{clients = "0,3-1"}]'],
                'The [[link.client]] table of clients = "0,3-1" has a range that ends before it begins: '
                "write the lower number first.",
            ),
            (
                ["model.cut=auto", "train.micro_batches=auto", "plan.profile_steps=0"],
                'model.cut = "auto" and train.micro_batches = "auto" cannot be without a measurement: '
                "set plan.profile_steps above 0, or plan.file to the plan.json of an earlier run.",
            ),
            (
                ["plan.predict=true", "plan.profile_steps=0"],
                "plan.predict = true cannot be without a measurement: "
                "set plan.profile_steps above 0, or plan.file to the plan.json of an earlier run.",
            ),
            (
                ["plan.client_memory_mb=64"],
                "plan.client_memory_mb = 64.0 limits the planner's choice, and there is none: "
                'set model.cut or train.micro_batches to "auto", or leave it out.',
            ),
            (
                ["broker.port=65534"],
                "No port is above 65535 (broker.port = 65534, broker.data_port = 65535, "
                "broker.events_port = 65536): lower broker.port to 65533 or set all.",
            ),
            (
                ["broker.data_port=5759"],
                "The broker needs three different ports (broker.port = 5757, broker.data_port = 5759, "
                "broker.events_port = 5759): change one of them.",
            ),
            (
                ["broker.port=0", "broker.data_port=7", "broker.events_port=7"],
                "The broker needs three different ports (broker.port = 0, broker.data_port = 7, "
                "broker.events_port = 7): change one of them.",
            ),
        ],
    )
    def test_it_names_the_keys_and_the_way_out(self, overrides: list[str], sentence: str) -> None:
        assert refusal(*overrides) == sentence

    @pytest.mark.parametrize(
        "overrides",
        [
            ["link.beat_seconds=4.9"],
            ["schedule.clients_per_round=4"],
            ["train.micro_batches=32"],
            ["run.commit_every=2", "schedule.policy=round_robin"],
            ["link.trace=home.csv", "link.rtt_ms=5"],
            ["link.trace=home.csv", 'link.client=[{clients = "3", uplink_mbps = 5}]'],
            ["model.cut=auto", "plan.profile_steps=0", "plan.file=plan.json"],
            ["train.micro_batches=auto", "plan.client_memory_mb=64"],
            ["plan.predict=true", "plan.client_memory_mb=64"],
            ["plan.min_cut=relu1"],
            ["broker.port=65533"],
            ["broker.port=0"],
            ["broker.port=0", "broker.data_port=1"],
            ["train.optimizer=adamw", "train.momentum=0"],
        ],
    )
    def test_what_is_just_possible_is_taken(self, overrides: list[str]) -> None:
        assert load_config(None, overrides) != Config()


class TestFiles:
    def test_a_missing_file_gets_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"There is no config file .*absent\.toml: check the path"):
            load_config(tmp_path / "absent.toml")

    def test_a_folder_gets_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\): mend that or name another"):
            load_config(tmp_path)

    def test_bad_toml_gets_file_and_line(self, tmp_path: Path) -> None:
        sentence = refusal_of_file(tmp_path, "[train]\nlr = \n")
        assert sentence.startswith("Config file run.toml is not valid TOML and must be corrected: ")
        assert "line 2" in sentence

    def test_a_file_that_is_not_text_gets_a_sentence(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=r"run\.toml is not text in UTF-8: save it as such"):
            load_config(path)

    def test_damaged_json_gets_a_sentence(self) -> None:
        with pytest.raises(ConfigError, match="run the same zsplit at both ends"):
            from_json(b'{"run": 3}')

    def test_json_with_a_key_of_another_version_names_it(self) -> None:
        with pytest.raises(ConfigError, match=r"train\.warp is not a key of the config"):
            from_json(b'{"train": {"warp": 9}}')


def links(*tables: str, **link: object) -> Callable[[int], ClientShape]:
    """Return the link of each of ten clients."""
    values = {f"link.{key}": value for key, value in link.items()}
    config = load_config(None, {"schedule.clients": 10, "link.client": [*map(tomllib.loads, tables)], **values})
    return lambda client: link_of(config, client)


class TestClientsLinks:
    def test_what_link_says_holds_for_every_client(self) -> None:
        link = links(uplink_mbps=10, downlink_mbps=25, rtt_ms=20)
        assert link(0) == link(9) == ClientShape(10.0, 25.0, 20.0, "")
        assert link(0).rows() == (Row(0.0, 10.0, 25.0),)

    def test_tables_take_its_place_key_by_key_and_the_last_wins(self) -> None:
        tables = ('clients = "0,4-6"\nuplink_mbps = 1', 'clients = "5"\nuplink_mbps = 0\nrtt_ms = 3')
        link = links(*tables, uplink_mbps=10, rtt_ms=20)
        assert [link(client).uplink_mbps for client in range(8)] == [1, 10, 10, 10, 1, 0, 1, 10]
        assert [link(client).rtt_ms for client in (4, 5)] == [20, 3]

    def test_a_star_is_every_client(self) -> None:
        assert links('clients = "*"\nrtt_ms = 4')(9).rtt_ms == 4

    def test_rates_of_a_client_end_its_trace_and_a_trace_its_rates(self) -> None:
        link = links('clients = "1"\ndownlink_mbps = 2', trace="home.csv")
        assert [link(0).trace, link(1)] == ["home.csv", ClientShape(0.0, 2.0, 0.0, "")]
        link = links('clients = "1"\ntrace = "home.csv"', uplink_mbps=5, rtt_ms=6)
        assert link(1) == ClientShape(0.0, 0.0, 6.0, "home.csv")

    @pytest.mark.parametrize(
        "header",
        ["", f"{COLUMNS}\n", COLUMNS.replace(",", ", ") + "\n", f"\ufeff{COLUMNS}\r\n", "\ufeff"],
    )
    def test_a_trace_is_lines_of_time_and_rates_with_or_without_a_header(self, tmp_path: Path, header: str) -> None:
        path = tmp_path / "home.csv"
        path.write_text(header + "0,10,25\n\n 1.5, 0, 1e1 \r\n", encoding="utf-8")
        rows = links(trace=str(path))(0).rows()
        assert rows == (Row(0.0, 10.0, 25.0), Row(1.5, 0.0, 10.0))

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("0,1,1\n5,x,1\n", "Line 2 of link.trace T is '5,x,1': write {}, three numbers of 0 or more."),
            ("0,1\n", "Line 1 of link.trace T is '0,1': write {}, three numbers of 0 or more."),
            ("{}\n0,1,1,1\n", "Line 2 of link.trace T is '0,1,1,1': write {}, three numbers of 0 or more."),
            ("0,-1,1\n", "Line 1 of link.trace T is '0,-1,1': write {}, three numbers of 0 or more."),
            ("0,nan,1\n", "Line 1 of link.trace T is '0,nan,1': write {}, three numbers of 0 or more."),
            (
                "0,1,1\n\n5,1,1\n5,2,2\n",
                "Line 4 of link.trace T is not later than the one before (5 s after 5 s): "
                "sort the lines by their time, each time once.",
            ),
            ("\n", "link.trace T has no line of {}: write one, or leave link.trace out."),
            ("{}\n", "link.trace T has no line of {}: write one, or leave link.trace out."),
        ],
    )
    def test_a_trace_that_is_wrong_names_the_line_and_the_way_out(
        self, tmp_path: Path, text: str, sentence: str
    ) -> None:
        path = tmp_path / "home.csv"
        path.write_text(text.format(COLUMNS))
        with pytest.raises(ConfigError) as caught:
            read_trace(str(path))
        assert str(caught.value).replace(str(path), "T") == sentence.format(COLUMNS)

    def test_a_trace_that_cannot_be_read_says_what_is_needed(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"none\.csv cannot be read \(No such file or directory\): give each client"
        ):
            read_trace(str(tmp_path / "none.csv"))
        (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match=r"bytes\.csv cannot be read \(it is not text in UTF-8\)"):
            read_trace(str(tmp_path / "bytes.csv"))


class TestDocs:
    def test_every_key_has_a_type_a_line_and_its_default(self) -> None:
        defaults = {each.key: each.default for each in keys()}
        assert defaults["train.batch_size"] == Config().train.batch_size
        assert all(each.doc and each.type for each in keys())
        assert next(each for each in keys() if each.key == "schedule.policy").choices == (
            "parallel",
            "round_robin",
            "async",
        )

    def test_the_page_holds_the_table_of_the_declarations(self) -> None:
        page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
        between = page.split("<!-- keys -->\n")[1].split("<!-- /keys -->")[0]
        assert between == table(), "write zsplit.config.table() between the markers of docs/config.md"
