"""Configurations: every mistake names its key, overrides reach every field, and a file runs nothing."""

from __future__ import annotations

import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from docstring_parser import parse_from_object
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_markup.backbone import BackboneConfig
from icl_markup.config import describe, load_config, to_dict
from icl_markup.embedded import quickstart_config
from icl_markup.episodes import EpisodeConfig
from icl_markup.errors import ConfigError
from icl_markup.experiment_config import ExperimentConfig, MethodConfig, Setting
from icl_markup.readers import TaskSource
from icl_markup.warmup import OptimiserConfig, ValidationConfig, WarmupConfig

FAST = settings(max_examples=60, deadline=None, derandomize=True)

WARMUP = """
tasks:
  - path: a.jsonl
    label_names: {LOC: place}
  - {path: b, checks: {duplicates: drop}}
output: runs/x
backbone: {name: some/model, dtype: bf16}
episodes: {n_way: [2, 4], k_shot: [1, 1], task_weights: {a: 2}}
optimiser:
  steps: 7
  learning_rate: 1e-3
validation: {patience: 3}
"""
EXPERIMENT = """
experiment: news
tasks: [{path: huffpost41}]
methods:
  - {name: plain, templates: [plain_letters_text_label]}
  - {name: tags, folders: [tags/0, tags/1]}
settings: [{n_way: null, k_shot: 0}, {n_way: 5}]
"""
CASES = [(WarmupConfig, WARMUP), (ExperimentConfig, EXPERIMENT)]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_nested_values_are_read_and_the_rest_are_defaults(tmp_path: Path) -> None:
    config = load_config(WarmupConfig, written(tmp_path, WARMUP))
    assert [task.path for task in config.tasks] == ["a.jsonl", "b"]
    assert config.tasks[0].label_names == {"LOC": "place"}
    assert config.tasks[1].checks.duplicates == "drop"
    assert config.backbone == BackboneConfig("some/model", dtype="bf16")
    assert config.episodes == EpisodeConfig((2, 4), (1, 1), task_weights={"a": 2.0})
    assert config.optimiser == OptimiserConfig(steps=7, learning_rate=0.001)
    assert config.validation == ValidationConfig(patience=3)
    assert (config.output, config.template, config.validation_tasks) == ("runs/x", "auto", [])
    experiment = load_config(ExperimentConfig, written(tmp_path, EXPERIMENT))
    assert experiment.methods[1] == MethodConfig("tags", folders=["tags/0", "tags/1"])
    assert experiment.settings == [Setting(None, 0), Setting(5)]


def test_overrides_reach_nested_fields_and_elements_of_lists(tmp_path: Path) -> None:
    path = written(tmp_path, WARMUP)
    words = ["--seed", "-3", "--optimiser.steps=9", "--tasks.1.path", "c d.csv", "--tasks.0.labels", "[x, y]",
             "--tasks.1.checks.min_examples", "2", "--save-every", "5", "--resume", "true", "--episodes.n-way", "null",
             "--tasks.0.oos_label=a=b", "--validation.every", "1", "--tag_width", "4"]  # fmt: skip
    config = load_config(WarmupConfig, path, words)
    assert (config.seed, config.optimiser.steps, config.save_every, config.resume) == (-3, 9, 5, True)
    assert (config.tasks[1].path, config.tasks[0].labels) == ("c d.csv", ["x", "y"])
    assert (config.tasks[1].checks.min_examples, config.tasks[1].checks.duplicates) == (2, "drop")
    assert (config.episodes.n_way, config.episodes.k_shot) == (None, (1, 1))
    assert (config.tasks[0].oos_label, config.validation, config.tag_width) == (
        "a=b",
        ValidationConfig(1, patience=3),
        4,
    )
    assert load_config(WarmupConfig, path) == load_config(WarmupConfig, path, []), "overrides leave no trace"
    replaced = load_config(
        ExperimentConfig, written(tmp_path, EXPERIMENT), ["--tasks.0", "{path: x}", "--methods", "[]"]
    )
    assert (replaced.tasks, replaced.methods) == ([TaskSource("x")], [])


def test_defaults_need_no_file_and_a_required_key_is_named() -> None:
    assert load_config(EpisodeConfig) == EpisodeConfig()
    assert load_config(WarmupConfig, None, ["--tasks", "[{path: a}]"]).tasks == [TaskSource("a")]
    with pytest.raises(ConfigError, match=r"^command line: tasks: Field required"):
        load_config(WarmupConfig)


def test_a_names_hyphen_in_an_override_is_left_as_it_is() -> None:
    assert load_config(EpisodeConfig, None, ["--task_weights.my-task", "2"]).task_weights == {"my-task": 2.0}


MISTAKES = {
    "unknown key": (WARMUP + "sed: 1\n", r"unknown key sed; did you mean 'seed'"),
    "unknown nested key": (WARMUP.replace("steps: 7", "step: 7"), r"unknown key optimiser\.step; did you mean 'steps'"),
    "unknown key in a list": (
        WARMUP.replace("{path: b,", "{pth: b,"),
        r"unknown key tasks\.1\.pth; did you mean 'path'",
    ),
    "unknown key, deep": (WARMUP.replace("duplicates", "duplicate"), r"tasks\.1\.checks\.duplicate; .*'duplicates'"),
    "key that is a number": (WARMUP + "3: 1\n", "unknown key 3"),
    "word for a number": (WARMUP.replace("steps: 7", "steps: many"), r"optimiser\.steps: .*integer.*got 'many'"),
    "fraction for a number": (WARMUP.replace("steps: 7", "steps: 1.5"), r"optimiser\.steps: .*got 1\.5"),
    "yes for a number": (WARMUP.replace("steps: 7", "steps: yes"), r"optimiser\.steps: .*got True"),
    "one number for a range": (WARMUP.replace("[2, 4]", "4"), r"episodes\.n_way: .*got 4"),
    "three numbers for a range": (WARMUP.replace("[2, 4]", "[2, 4, 6]"), r"episodes\.n_way"),
    "word in a range": (WARMUP.replace("[2, 4]", "[2, x]"), r"episodes\.n_way\.1: .*got 'x'"),
    "value of no choice": (WARMUP.replace("bf16", "bf17"), r"backbone\.dtype: .*'bf16'.*got 'bf17'"),
    "value in a list": (WARMUP.replace("path: a.jsonl", "path: 3"), r"tasks\.0\.path: .*string.*got 3"),
    "null where there is no null": (WARMUP.replace("runs/x", "null"), r"output: .*got None"),
    "scalar for a section": (WARMUP.replace("validation: {patience: 3}", "validation: 3"), r"validation: .*got 3"),
    "mapping for a list": ("tasks: {path: a}\n", r"tasks: .*list"),
    "missing path": ("tasks: [{name: a}]\n", r"tasks\.0\.path: Field required"),
    "malformed YAML": (WARMUP + "a: [1,\n", "not valid YAML"),
    "tabs": ("a:\n\tb: 1\n", "not valid YAML"),
    "two documents": (WARMUP + "---\na: 1\n", "not valid YAML"),
    "another encoding": ("output: caf\u00e9".encode("latin-1"), "not valid YAML"),
    "a list": ("- 1\n", "expected keys and values, found list"),
    "a word": ("word", "expected keys and values, found str"),
    "impossible date": (WARMUP + "seed: 2024-13-45\n", "not valid YAML"),
    "number without digits": (WARMUP + "seed: 0x_\n", "not valid YAML"),
    "tag that does not fit": (WARMUP + "seed: !!timestamp soon\n", "not valid YAML"),
    "empty tagged number": (WARMUP + "seed: !!int ''\n", "not valid YAML"),
    "tagged word for a truth": (WARMUP + "resume: !!bool perhaps\n", "not valid YAML"),
    "bottomless lists": (WARMUP + "seed: " + "[" * 5000, "not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_file_is_an_error_that_names_file_and_key(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        load_config(WarmupConfig, path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no such configuration file"):
            load_config(WarmupConfig, path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed"], "--seed lacks a value"),
        (["seed", "3"], "expected --key, found 'seed'"),
        (["--sed", "3"], "unknown key sed; did you mean 'seed'"),
        (["--optimiser.step", "3"], r"unknown key optimiser\.step; did you mean 'steps'"),
        (["--optimiser.steps", "many"], r"optimiser\.steps: .*got 'many'"),
        (["--seed", "[1"], "--seed: '.1' is not valid YAML"),
        (["--seed", "2024-13-45"], "--seed: .*is not valid YAML"),
        (["--seed", "!!python/object/apply:os.getpid []"], "--seed: .*is not valid YAML"),
        (["--tasks.2.path", "x"], r"--tasks\.2\.path: no element '2'"),
        (["--tasks.first.path", "x"], r"--tasks\.first\.path: no element 'first'"),
        (["--tasks.²", "x"], "no element '²'"),
        (["--output.x.y", "1"], r"--output\.x\.y"),
        (["--output.x", "1"], r"--output\.x"),
        (["--tasks.0", "null", "--tasks.0.path", "x", "--tasks.0.pth", "y"], r"tasks\.0\.pth"),
        (["--"], "lacks a value"),
        (["--=1"], "unknown key"),
    ],
)
def test_a_mistake_on_the_command_line_is_an_error_that_names_the_key(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(WarmupConfig, written(tmp_path, WARMUP), words)


def leaves(cls: type[Any], prefix: str = "") -> dict[str, str]:
    """Every key of a configuration with its docstring, read in another way than `describe` does."""
    found: dict[str, str] = {}
    docs = {param.arg_name: param.description or "" for param in parse_from_object(cls).params}
    for item in fields(cls):
        kind = get_type_hints(cls)[item.name]
        key = prefix + item.name
        found |= leaves(kind, f"{key}.") if is_dataclass(kind) else {key: docs.get(item.name, "")}
    return found


@pytest.mark.parametrize("cls", [WarmupConfig, ExperimentConfig, TaskSource])
def test_the_help_names_every_key_with_its_docstring(cls: type[Any]) -> None:
    text = " ".join(describe(cls).split())
    keys = leaves(cls)
    assert len(keys) >= 12
    for key, docstring in keys.items():
        assert docstring, f"{key} has no docstring"
        assert f"--{key} " in text
        assert " ".join(docstring.split()) in text


@pytest.mark.parametrize(("cls", "text"), CASES)
def test_a_configuration_survives_being_written_as_yaml(tmp_path: Path, cls: type[Any], text: str) -> None:
    config = load_config(cls, written(tmp_path, text))
    again = load_config(cls, written(tmp_path, yaml.safe_dump(to_dict(config))))
    assert again == config
    assert to_dict(again) == to_dict(config)


def test_the_shipped_configuration_loads() -> None:
    assert load_config(WarmupConfig, quickstart_config()).optimiser.steps > 0


@pytest.mark.parametrize(
    "call", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/apply:os.mkdir", "!!python/name:os.system"]
)
def test_a_file_that_asks_for_python_objects_is_refused_and_runs_nothing(tmp_path: Path, call: str) -> None:
    target = tmp_path / "made-by-yaml"
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(WarmupConfig, written(tmp_path, f"output: {call} ['{target}']\n"))
    assert not target.exists()


_PIECES = ["- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "? ", ": ", "'", '"', "|\n", "---\n", "%YAML 1.1\n", "\n",
           "  ", "#", "tasks: ", "path: ", "seed: ", "episodes:\n  ", "n_way: "]  # fmt: skip
_LINES = st.builds(
    "{}: {} {}\n".format,
    st.sampled_from(["seed", "output", "resume", "optimiser", "tasks", "tag_width", "3", "~", "[a]", "<<", "episodes"]),
    st.sampled_from(["", "", "!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "!!omap", "!!x"]),
    st.sampled_from(["''", "x", "1e9", "0o7", "0b_", "1:30", "2020-02-30", ".inf", "=", "~", "[[1]]", "{a: b}"]),
)
_YAML = st.lists(_LINES | st.sampled_from(_PIECES) | st.text(max_size=4), max_size=12).map("".join)


@settings(FAST, max_examples=200)
@given(text=_YAML.map(str.encode) | st.binary(max_size=20), after=st.booleans())
def test_any_text_gives_a_configuration_or_a_configuration_error(text: bytes, after: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), WARMUP.encode() + text if after else text)
        try:
            assert isinstance(load_config(WarmupConfig, path), WarmupConfig)
        except ConfigError as error:
            assert str(error).startswith(f"{path}: ")
