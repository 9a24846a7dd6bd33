"""What counts of a file, the environment and options, and what an operator is told of his mistakes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import SecretStr

from gralora_runtime.config import AdapterSource, EngineConfig
from gralora_runtime.errors import ConfigError
from gralora_server.config import ServerConfig
from gralora_server.errors import ConfigInvalidError
from gralora_server.settings.configurations import engine_config, server_config
from gralora_server.settings.layers import NOTHING_SAID, Effective, Layers
from gralora_server.settings.sections import Settings
from gralora_server.settings.table import SETTINGS, Setting
from gralora_server.tenants.settings import LimitSettings, Role

KEYS = {setting.key: setting for setting in SETTINGS}


class Folder:
    """A configuration file, and what is read from it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gralora.toml"

    def read(self, text: str, environment: dict[str, str] | None = None, **options: object) -> Effective:
        self.path.write_text(text)
        given = {key.replace("__", "."): value for key, value in options.items()}
        return Layers(self.path, environment or {}, given).read()

    def problems(self, text: str, environment: dict[str, str] | None = None, **options: object) -> list[str]:
        """Without the name of the file."""
        with pytest.raises(ConfigInvalidError) as caught:
            self.read(text, environment, **options)
        return [problem.removeprefix(f"{self.path}:") for problem in caught.value.problems]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize(
    ("key", "file", "variable", "option", "values"),
    [
        ("engine.max_queue", "7", "8", "9", (7, 8, 9)),
        ("engine.device", '"cpu"', "cuda", "auto", ("cpu", "cuda", "auto")),
        ("engine.prefix_cache", "false", "true", False, (False, True, False)),
        ("engine.cuda_graphs", "[4, 2]", "off", "8,1", ((2, 4), (), (1, 8))),
        ("engine.model", '"/m"', "/n", "/o", (Path("/m"), Path("/n"), Path("/o"))),
        ("memory.host_cache_bytes", '"2GiB"', "3k", "5", (2 << 30, 3072, 5)),
        ("memory.kv_cache_bytes", "1024", "1.5 GB", "2m", (1024, 3 << 29, 2 << 20)),
        ("server.grace_s", "1", "2.5", "3", (1.0, 2.5, 3.0)),
        ("server.address", '"a:1"', "b:2", "[::1]:3", ("a:1", "b:2", "[::1]:3")),
        (
            "adapters.sources",
            '["/a,hold", "hf://o"]',
            "'/b c' s3://b,hold",
            ["/d"],
            (
                (AdapterSource("/a", follows=False), AdapterSource("hf://o")),
                (AdapterSource("/b c"), AdapterSource("s3://b", follows=False)),
                (AdapterSource("/d"),),
            ),
        ),
        ("adapters.hub_token", '"x"', "y", "z", (SecretStr("x"), SecretStr("y"), SecretStr("z"))),
        ("objectives.first_token_s", "0.5", "1", "2", (0.5, 1.0, 2.0)),
    ],
)
def test_an_option_counts_before_a_variable_before_the_file_before_the_default(
    key: str, file: str, variable: str, option: object, values: tuple[object, ...], folder: Folder
) -> None:
    setting = KEYS[key]
    text = f"[{setting.section}]\n{setting.name} = {file}\n"
    environment = {setting.variables[0]: variable}
    readings = [
        NOTHING_SAID.read(),
        folder.read(text),
        folder.read(text, environment),
        folder.read(text, environment, **{key.replace(".", "__"): option}),
    ]

    assert [setting.value(reading.settings) for reading in readings] == [setting.default, *values]
    assert [reading.origins[key] for reading in readings] == [
        "default",
        f"{folder.path}:2",
        f"${setting.variables[0]}",
        setting.option,
    ]


def test_the_hubs_own_variable_counts_after_ours() -> None:
    def token(**environment: str) -> str:
        value = Layers(None, environment, {}).read().settings.adapters.hub_token
        assert value is not None
        return value.get_secret_value()

    assert token(HF_TOKEN="theirs") == "theirs"
    assert token(HF_TOKEN="theirs", GRALORA_ADAPTERS_HUB_TOKEN="ours") == "ours"


def test_a_list_in_a_variable_that_cannot_be_taken_apart_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigInvalidError, match=r"\$GRALORA_ADAPTERS_SOURCES cannot be taken apart: No closing quotation"
    ):
        Layers(None, {"GRALORA_ADAPTERS_SOURCES": "'a b"}, {}).read()


def test_an_empty_variable_says_nothing() -> None:
    assert Layers(None, {"GRALORA_ENGINE_MAX_QUEUE": ""}, {}).read().settings == Settings()


def test_a_misspelt_variable_is_refused_and_somebody_elses_is_not() -> None:
    theirs = {"GRALORA_SERVER_PORT": "tcp://10.0.0.1:50051", "GRALORA_SERVER_SERVICE_HOST": "10.0.0.1"}
    assert Layers(None, theirs, {}).read().settings == Settings()
    with pytest.raises(ConfigInvalidError) as caught:
        Layers(None, theirs | {"GRALORA_ENGINE_MAX_QEUE": "3"}, {}).read()

    assert caught.value.problems == (
        "$GRALORA_ENGINE_MAX_QEUE is not a setting; did you mean GRALORA_ENGINE_MAX_QUEUE?",
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_names_follow_one_rule(setting: Setting) -> None:
    """What is an exception to it is listed here."""
    options = {
        "adapters.sources": "--adapters",
        "adapters.allow_roots": "--allow-root",
        "adapters.allow_unknown_config_keys": "--allow-unknown-config-key",
    }

    assert setting.option == options.get(setting.key, "--" + setting.name.replace("_", "-"))
    assert setting.variables[0] == f"GRALORA_{setting.section.upper()}_{setting.name.upper()}"
    assert setting.text.endswith(".")
    assert setting.kind


def test_options_are_not_ambiguous() -> None:
    assert len({setting.option for setting in SETTINGS}) == len(SETTINGS)


def test_whatever_is_configured_is_a_setting() -> None:
    """A field of a configuration that no operator could set would be no setting. `prices` are a `profile`'s,
    `model_dir` is the engine's `model`, and `tenancy` is at the top of the file."""
    composed = {
        "host",
        "port",
        "tls",
        "metrics",
        "http",
        "ui",
        "tracing",
        "prices",
        "supervised",
        "tenancy",
        "model_dir",
    }
    configured = {field.name for kind in (EngineConfig, ServerConfig) for field in fields(kind)} - composed

    assert configured <= {setting.field for setting in SETTINGS}


def test_the_defaults_are_those_of_the_configurations() -> None:
    assert engine_config(Settings(), Path("m")) == EngineConfig(model=Path("m"))
    assert server_config(Settings()) == ServerConfig()


@pytest.mark.parametrize("number", [-1, 0, 1, 2, 10**9])
@pytest.mark.parametrize("setting", [one for one in SETTINGS if one.kind in ("INTEGER", "FLOAT", "BYTES")], ids=str)
def test_what_a_setting_allows_its_configuration_allows(setting: Setting, number: int) -> None:
    """Or the configuration says so itself, and names its field: nothing passes both that either refuses."""
    try:
        settings = Layers(None, {}, {setting.key: str(number)}).read().settings
    except ConfigInvalidError as error:
        (problem,) = error.problems
        assert problem.startswith(setting.option) or setting.name in problem
    else:
        assert setting.value(settings) == number


def test_relative_paths_are_relative_to_the_file(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = """
    [engine]
    model = "models/m"
    [adapters]
    sources = ["mine,hold", "/theirs", "hf://org"]
    allow_roots = ["../shared"]
    [server]
    token_file = "tokens"
    [jwt]
    issuer = "i"
    audience = "a"
    jwks_file = "keys.json"
    """
    settings = folder.read(text, {"GRALORA_ADAPTERS_STATE_DIR": "state"}).settings
    assert settings.jwt is not None

    assert settings.engine.model == tmp_path / "models" / "m"
    assert [source.uri for source in settings.adapters.sources] == [str(tmp_path / "mine"), "/theirs", "hf://org"]
    assert settings.adapters.sources[0].follows is False
    assert settings.adapters.allow_roots == (tmp_path / "../shared",)
    assert settings.server.token_file == tmp_path / "tokens"
    assert settings.jwt.jwks_file == tmp_path / "keys.json"
    assert settings.adapters.state_dir == Path("state")  # not the file's: relative to where the command runs


def test_tenants_are_read_with_all_that_is_theirs(folder: Folder) -> None:
    text = f"""
    public_adapters = ["free/*"]
    [tenants.acme]
    weight = 2
    [tenants.acme.limits]
    streams = 3
    adapter_bytes = "2GiB"
    upload_bytes = 4096
    [[tenants.acme.tokens]]
    sha256 = "{"0" * 64}"
    expires = 2030-01-02T03:04:05Z
    role = "manage"
    """
    settings = folder.read(text).settings
    (token,) = settings.tenants["acme"].tokens

    assert settings.public_adapters == ("free/*",)
    assert settings.tenants["acme"].weight == 2.0
    assert settings.tenants["acme"].limits == LimitSettings(streams=3, adapter_bytes=2 << 30, upload_bytes=4096)
    assert token.role is Role.MANAGE
    assert token.expires is not None
    assert token.expires.isoformat() == "2030-01-02T03:04:05+00:00"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[engine]\n\nmax_queue = 0", "3: engine.max_queue should be greater than or equal to 1, got 0"),
        ('[engine]\nmax_queue = "7"', "2: engine.max_queue should be a valid integer, got '7'"),
        ("[engine]\nmax_queue = true", "2: engine.max_queue should be a valid integer, got True"),
        ("[engine]\nmax_queue = 1.5", "2: engine.max_queue should be a valid integer, got 1.5"),
        ("[server]\nreflection = 1", "2: server.reflection should be a valid boolean, got 1"),
        ("[server]\ngrace_s = nan", "2: server.grace_s should be greater than or equal to 0, got nan"),
        ('engine = { device = "abacus" }', "1: engine.device must be one of auto, cpu, cuda, got 'abacus'"),
        ("[engine]\ncuda_graphs = [1, 99]", "2: cuda_graphs must be numbers of rows from 1 to max_num_seqs (32)"),
        ('[engine]\ncuda_graphs = "some"', "2: engine.cuda_graphs 'some' is not on, off or numbers of rows"),
        ('[memory]\nkv_cache_bytes = "lots"', "2: memory.kv_cache_bytes 'lots' is not a size"),
        ("[memory]\nkv_cache_bytes = 0", "2: kv_cache_bytes must be at least 1, got 0"),
        ('[adapters]\nsources = [\n"a",\n"b,keep",\n]', "4: adapters.sources[1] 'b,keep' is not SOURCE or SOURCE,hold"),
        ('[server]\naddress = "nowhere"', "2: server.address 'nowhere' is not HOST:PORT"),
        ('[server]\naddress = "a:70000"', "2: server.address 'a:70000': a port is at most 65535"),
        ('[server]\n\ntls_cert = "c"', "3: tls_cert is given alone"),
        ("[sever]", "1: there is no setting sever; did you mean server?"),
        ("[engine]\nmax_qeue = 1", "2: there is no setting engine.max_qeue; did you mean engine.max_queue?"),
        ("[server]\npage_size = 1", "2: there is no setting server.page_size; did you mean memory.page_size?"),
        ("[jwt]\nx = 1", "1: jwt.issuer is missing"),
        (
            "[[tenants.a.tokens]]\nrole = 'king'",
            "2: tenants.a.tokens[0].role should be 'generate', 'manage' or 'admin'",
        ),
        ("[tenants.a.limits]\nstream = 1", "2: there is no setting tenants.a.limits.stream; did you mean"),
        (
            "[tenants.a.limits]\nadapter_bytes = 0",
            "2: tenants.a.limits.adapter_bytes should be greater than or equal to 1",
        ),
        ("[tenants.a]\nweight = 0", "2: tenants.a.weight should be greater than 0, got 0"),
        ("[tenants.'a b']", "1: tenants.'a b' should match pattern"),
        ("tenants = 3", "1: tenants should be an object, got 3"),
        ("a = 1\na = 2", "2: this is not TOML: Cannot overwrite a value"),
        ("a = ", "1: this is not TOML: Invalid value"),
        ("[a", "1: this is not TOML: Expected ']'"),
    ],
    ids=lambda value: value.replace("\n", "|"),
)
def test_a_mistake_is_told_with_its_line_its_key_and_what_is_allowed(text: str, problem: str, folder: Folder) -> None:
    assert any(found.startswith(problem) for found in folder.problems(text)), folder.problems(text)


def test_all_mistakes_are_told_at_once_from_the_top_to_the_end(folder: Folder) -> None:
    text = "[server]\nadress = 1\n[tenants.a]\nweight = 0\n[engine]\nmax_queue = 0\nthreads = 0\n"
    told = folder.problems(text, {"GRALORA_MEMORY_PAGE_SIZE": "many"}, server__grace_s="-1")

    assert [problem.split(maxsplit=1)[0] for problem in told] == [
        "2:",
        "4:",
        "6:",
        "7:",
        "--grace-s",
        "$GRALORA_MEMORY_PAGE_SIZE",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[adapters]\nhub_token = 1234567890",
        '[[admin_tokens]]\nsha256 = "1234567890"',
        '[[tenants.a.tokens]]\nsha256 = "1234567890"',
        'admin_tokens = ["1234567890"]',
        '[tenants.a]\ntokens = "1234567890"',
        '[server]\ntoken = "1234567890"',
        'password = "1234567890" x',
    ],
)
def test_what_may_be_a_secret_is_not_repeated(text: str, folder: Folder) -> None:
    """A complaint goes to a log and to whoever called for a reload."""
    told = " ".join(folder.problems(text))

    assert "1234567890" not in told


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = " + "9" * 5000, "has a number of too many digits"),
        ("a = " + "[" * 5000 + "]" * 5000, "has arrays or tables that are nested too deeply"),
        ("a = " + "{a = " * 5000 + "1" + "}" * 5000, "has arrays or tables that are nested too deeply"),
    ],
    ids=["digits", "arrays", "tables"],
)
def test_a_file_that_python_itself_refuses_is_refused_by_name(folder: Folder, text: str, problem: str) -> None:
    """It was a traceback, and with a reload an internal error."""
    folder.path.write_text(text)

    with pytest.raises(ConfigInvalidError, match=rf"gralora\.toml {problem}"):
        Layers(folder.path, {}, {}).read()


def test_a_file_that_is_not_there_or_not_text_is_refused_by_name(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalidError, match=r"gralora\.toml cannot be read: No such file"):
        Layers(folder.path, {}, {}).read()
    folder.path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigInvalidError, match=r"gralora\.toml is not UTF-8"):
        Layers(folder.path, {}, {}).read()
    with pytest.raises(ConfigError, match="cannot be read"):
        Layers(tmp_path, {}, {}).read()


def test_tables_in_tables_without_end_are_refused(folder: Folder) -> None:
    assert "nested too deeply" in folder.problems("a" + ".a" * 3000 + " = 1")[0]


def test_a_profile_whose_name_no_file_has_is_refused(folder: Folder) -> None:
    assert "cannot be read" in folder.problems('[engine]\nprofile = "\\u0000"\n')[0]
