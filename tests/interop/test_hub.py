"""m3jax.load of a repository on the Hugging Face hub, which is a folder here."""

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import m3jax
from m3jax.errors import CheckpointError

_SISO = Path(__file__).parents[1] / "reference" / "A_siso"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of repositories; the second one gives the names of what was downloaded."""
    downloaded = []

    def snapshot_download(name, allow_patterns):
        if not (tmp_path / "hub" / name).is_dir():
            raise LocalEntryNotFoundError("Cannot reach the hub.\nCheck the connection.")
        cache = tmp_path / "cache" / name
        cache.mkdir(parents=True)
        for file in (tmp_path / "hub" / name).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                downloaded.append(file.name)
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub", downloaded


def test_repository_is_loaded_without_its_pickles(hub):
    folder, downloaded = hub
    shutil.copytree(_SISO, folder / "state-spaces" / "mamba3-siso")
    (folder / "state-spaces" / "mamba3-siso" / "pytorch_model.bin").touch()
    model, _ = m3jax.load("state-spaces/mamba3-siso")
    assert model.config.d_model == 64
    assert sorted(downloaded) == ["config.json", "model.safetensors"]


def test_repository_of_pickles_is_refused(hub):
    folder, _ = hub
    (folder / "state-spaces" / "mamba2-130m").mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (folder / "state-spaces" / "mamba2-130m" / name).touch()
    with pytest.raises(CheckpointError, match=r"no safetensors files.*reading a pickle can run any code"):
        m3jax.load("state-spaces/mamba2-130m")


def test_no_network(hub):
    message = r"'state-spaces/mamba3': no such directory here.*\(LocalEntryNotFoundError: Cannot reach the hub\.\)"
    with pytest.raises(CheckpointError, match=message):
        m3jax.load("state-spaces/mamba3")


def test_directories_come_first(hub, tmp_path):
    shutil.copytree(_SISO, tmp_path / "runs" / "mine")
    assert m3jax.load("runs/mine")[0].config.d_model == 64
    assert hub[1] == []
    with pytest.raises(CheckpointError, match="runs/a/b does not exist"):
        m3jax.load("runs/a/b")
