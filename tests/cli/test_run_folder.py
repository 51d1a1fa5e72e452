"""A run's folder is found, refused, begun and read back as it should be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bitorch_engine.cli.errors import RunError, UsageError
from bitorch_engine.cli.run_folder import RunFolder, Settings
from bitorch_engine.cli.training import Epoch, Recipe

SETTINGS = Settings("digits", None, "cnn", 2, None, None, 4, False, ("head",), Recipe(lr=0.1, seed=3))


def test_without_a_name_the_first_free_number_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = RunFolder.choose(None, SETTINGS)
        folder.begin(SETTINGS)
        names.append(str(folder.path))
    assert names == ["runs/digits-cnn-w2", "runs/digits-cnn-w2-2", "runs/digits-cnn-w2-3"]


def test_the_title_names_data_model_and_bits() -> None:
    settings = replace(SETTINGS, data="/data/birds.npz", model="zoo.nets:tiny", a_bit=8, g_bit=6)
    assert settings.title == "birds-tiny-w2a8g6"


def test_a_folder_in_use_is_refused_and_overwriting_removes_the_runs_files_only(tmp_path: Path) -> None:
    folder = RunFolder.choose(tmp_path / "run", SETTINGS)
    folder.begin(SETTINGS)
    folder.checkpoint.write_text("old")
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(
        UsageError, match="run is there already; choose another --out, or --resume .*run, or --overwrite"
    ):
        RunFolder.choose(folder.path, SETTINGS)
    RunFolder.choose(folder.path, SETTINGS, overwrite=True).begin(SETTINGS)
    assert sorted(path.name for path in folder.path.iterdir()) == ["notes.txt", "settings.json"]


def test_a_folder_that_cannot_be_made_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot begin a run in"):
        RunFolder.choose(tmp_path / "file" / "run", SETTINGS).begin(SETTINGS)


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(SETTINGS)
    assert folder.read_settings() == SETTINGS


def test_other_folders_are_not_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(UsageError, match=r"is not the folder of a run: it has no settings\.json"):
        folder.read_settings()
    for content in ("{", "[]", json.dumps({"recipe": {}, "skip": []}), json.dumps({"recipe": {"x": 1}, "skip": []})):
        folder.settings.write_text(content)
        with pytest.raises(RunError, match="is damaged or of another version"):
            folder.read_settings()


def test_metrics_are_one_line_an_epoch_and_are_cut_back_on_resuming(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.epochs() == []
    epochs = [Epoch(n, 1 / n, 0.5, 0.25, 0.1, 0.01, 2.0) for n in (1, 2, 3)]
    for epoch in epochs:
        folder.append(epoch)
    assert folder.epochs() == epochs
    assert json.loads(folder.metrics.read_text().splitlines()[1])["epoch"] == 2
    folder.keep_epochs(2)
    assert folder.epochs() == epochs[:2]
