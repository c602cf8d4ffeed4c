"""Where relative paths start, and where a run must not lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.config import ModelConfig
from data.config import DataConfig
from launch.errors import RunDirError
from launch.paths import HOME_VARIABLE, JOB_VARIABLE, resolve, resolve_data, resolve_model, runs_root

JOB = {JOB_VARIABLE: json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}})}


def test_relative_paths_start_at_home_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    assert resolve("runs/../a") == tmp_path / "a"
    monkeypatch.setenv(HOME_VARIABLE, "/shared")
    assert resolve("runs") == Path("/shared/runs")
    assert resolve("/else") == Path("/else")
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve("~/runs") == Path("/home/me/runs")


def test_a_model_is_a_folder_or_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    (tmp_path / "org" / "here").mkdir(parents=True)
    there = resolve_model(ModelConfig(path="org/here", tokenizer="org/elsewhere"))
    assert (there.path, there.tokenizer) == (str(tmp_path / "org" / "here"), "org/elsewhere")
    # What no hub name looks like is a path, there or not, so that the message about it names the folder.
    assert resolve_model(ModelConfig(path="runs/sft/model")).path == str(tmp_path / "runs" / "sft" / "model")
    assert resolve_model(ModelConfig(path="./model")).path == str(tmp_path / "model")


def test_sources_keep_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    data = DataConfig.model_validate(
        {"train": ["a/*.jsonl", "s3://bucket/b.parquet", "hub:org/set"], "heldout": "c.csv", "max_tokens": 8}
    )
    resolved = resolve_data(data)
    assert [source.path for source in resolved.train] == [
        str(tmp_path / "a" / "*.jsonl"),
        "s3://bucket/b.parquet",
        "hub:org/set",
    ]
    assert resolved.heldout[0].path == str(tmp_path / "c.csv")


def test_a_job_must_not_write_into_the_folder_that_is_deleted_with_it() -> None:
    with pytest.raises(RunDirError, match=r"run\.root is 'runs'.*deleted.*absolute path.*TROUPE_HOME"):
        runs_root("runs", JOB)


@pytest.mark.parametrize(
    ("root", "environment", "place"),
    [
        ("/elsewhere/runs", JOB, Path("/elsewhere/runs")),
        ("~/runs", JOB, Path.home() / "runs"),
        ("runs", {**JOB, HOME_VARIABLE: "/shared"}, Path("/shared/runs")),
        # A job without an uploaded folder runs where its head node does.
        ("runs", {JOB_VARIABLE: json.dumps({"runtime_env": {}, "metadata": {}})}, Path.cwd() / "runs"),
        ("runs", {}, Path.cwd() / "runs"),
    ],
)
def test_other_places_are_kept(root: str, environment: dict[str, str], place: Path) -> None:
    assert runs_root(root, environment) == place


def test_a_relative_home_keeps_a_job_from_nothing() -> None:
    with pytest.raises(RunDirError, match=r"run\.root is 'runs'"):
        runs_root("runs", {**JOB, HOME_VARIABLE: "."})


def test_the_cache_of_data_starts_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
    data = DataConfig.model_validate({"train": "a.jsonl", "max_tokens": 8, "cache_dir": "runs/.data"})
    assert resolve_data(data).cache_dir == str(tmp_path / "runs" / ".data")
