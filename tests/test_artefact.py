from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_compressor import RandomStates, fitted, same_output, scheme
from tests.tiny_models import tiny_config
from vqkv import artefact
from vqkv.compressor import KVCompressor, Provenance
from vqkv.errors import ArtefactError, NotFittedError, SchemeError
from vqkv.geometry import Geometry
from vqkv.scheme import fingerprint
from vqkv.scheme_files import load_scheme

Damage = Callable[[Path], None]


@pytest.fixture
def compressor(geometry: Geometry) -> KVCompressor:
    return fitted(geometry)


@pytest.fixture
def saved(compressor: KVCompressor, tmp_path: Path) -> Path:
    return compressor.save_pretrained(tmp_path / "artefact")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["group", "head", "layer", "subspace", "model"])
def test_saving_and_loading_changes_no_bit(
    geometry: Geometry, sharing: str, tmp_path: Path
) -> None:
    compressor = fitted(geometry, stream={"sharing": sharing})
    loaded = KVCompressor.from_pretrained(compressor.save_pretrained(tmp_path / "a"))
    assert same_output(loaded, compressor)
    assert loaded.scheme == compressor.scheme
    assert loaded.geometry == compressor.geometry
    assert loaded.identity() == compressor.identity()
    assert loaded.report() == compressor.report()


def test_the_same_compressor_gives_the_same_bytes(compressor: KVCompressor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compressor.save_pretrained(tmp_path / name)
    for file in ("config.json", "codebooks.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_the_folder_holds(compressor: KVCompressor, tmp_path: Path) -> None:
    compressor.provenance = Provenance("org/model", {"tokens": 64, "seed": 0})
    folder = compressor.save_pretrained(tmp_path / "a")
    assert names(folder) == ["codebooks.safetensors", "config.json"]
    assert names(tmp_path) == ["a"]
    stored = json.loads((folder / "config.json").read_text())
    assert stored["scheme"] == compressor.scheme.to_dict()
    assert stored["fingerprint"] == compressor.scheme.fingerprint()
    assert stored["base_model"] == "org/model"
    assert stored["calibration"] == {"tokens": 64, "seed": 0}
    assert stored["library_version"] and stored["format_version"] == 2
    tensors = load_file(folder / "codebooks.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == compressor.nbytes()
    loaded = KVCompressor.from_pretrained(folder)
    assert loaded.provenance == compressor.provenance


def test_data_free_compressors_are_saved_too(geometry: Geometry, tmp_path: Path) -> None:
    compressor = KVCompressor(load_scheme("scalar-4bit"), geometry)
    loaded = KVCompressor.from_pretrained(compressor.save_pretrained(tmp_path / "a"))
    assert same_output(loaded, compressor)


def test_nothing_to_save_yet(geometry: Geometry, tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match="has nothing to save: fit it first"):
        KVCompressor(scheme(), geometry).save_pretrained(tmp_path / "a")
    assert names(tmp_path) == []


# -- damage ------------------------------------------------------------------------------------


def flip(name: str, position: float) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x20
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, part: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(part * len(data))])

    return damage


def write(name: str, text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def change(**changes: Any) -> Damage:
    return lambda folder: edit(folder, **changes)


def swap(folder: Path) -> None:
    """Codebooks of another artefact, of the same shapes."""
    path = folder / "codebooks.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def no_health(folder: Path) -> None:
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    del stored["health"]
    path.write_text(json.dumps(stored))


def unhealthy(field: str, value: Any) -> Damage:
    """One field of one codebook's health changed."""

    def damage(folder: Path) -> None:
        health = json.loads((folder / "config.json").read_text())["health"]
        health["0.keys"][0][field] = value
        edit(folder, health=health)

    return damage


def rescheme(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())["scheme"]
    stored["residency"]["sinks"] += 1
    edit(folder, scheme=stored)


CODEBOOKS = "codebooks.safetensors: damaged, cut short, or from another artefact: its SHA-256 is"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(flip("codebooks.safetensors", 0.0), CODEBOOKS, id="first byte"),
        pytest.param(flip("codebooks.safetensors", 0.5), CODEBOOKS, id="a byte"),
        pytest.param(flip("codebooks.safetensors", 1.0), CODEBOOKS, id="last byte"),
        pytest.param(cut("codebooks.safetensors", 0.9), CODEBOOKS, id="cut"),
        pytest.param(cut("codebooks.safetensors", 0.0), CODEBOOKS, id="empty"),
        pytest.param(swap, CODEBOOKS, id="swapped"),
        pytest.param(
            lambda f: (f / "codebooks.safetensors").unlink(),
            "codebooks.safetensors is missing",
            id="no codebooks",
        ),
        pytest.param(
            lambda f: (f / "config.json").unlink(),
            "no vqkv artefact, config.json is missing",
            id="no config",
        ),
        pytest.param(cut("config.json", 0.5), "config.json: damaged: ", id="half a config"),
        pytest.param(write("config.json", "\x00"), "config.json: damaged: ", id="no JSON"),
        pytest.param(write("config.json", "[]"), "not a vqkv artefact", id="JSON list"),
        pytest.param(
            write("config.json", '{"model_type": "llama"}'),
            "not a vqkv artefact (`format` is not 'vqkv')",
            id="a model's config",
        ),
        pytest.param(
            change(format_version=7), "format version 7, vqkv 0.1.0 reads version 2", id="version"
        ),
        pytest.param(no_health, "damaged: ['health'] are missing", id="a field gone"),
        pytest.param(rescheme, "`scheme` is not what `fingerprint` says", id="edited scheme"),
        pytest.param(change(scheme=[]), "config.json: damaged: `scheme` is []", id="no scheme"),
        pytest.param(
            change(codebooks_sha256=None), "damaged: `codebooks_sha256` is None", id="no checksum"
        ),
        pytest.param(change(base_model=7), "damaged: `base_model` is 7", id="odd model"),
        pytest.param(change(calibration=[]), "damaged: `calibration` is []", id="odd calibration"),
        pytest.param(unhealthy("entropy", "high"), "holds 'high', which is no number", id="words"),
        pytest.param(
            unhealthy("last_gain", "little"), "holds 'little', which is no number", id="odd gain"
        ),
        pytest.param(unhealthy("inertia", [None]), "holds None, which is no number", id="nulls"),
        pytest.param(unhealthy("inertia", 3), "config.json: damaged: ", id="no list"),
        pytest.param(change(geometry={}), "config.json: damaged: ", id="no geometry"),
        pytest.param(change(geometry={"more": 1}), "config.json: damaged: ", id="odd geometry"),
        pytest.param(change(health={"0.keys": [{}]}), "config.json: damaged: ", id="odd health"),
        pytest.param(change(health=[1]), "config.json: damaged: ", id="no health"),
    ],
)
def test_damage_is_refused(saved: Path, damage: Damage, message: str) -> None:
    damage(saved)
    with pytest.raises(ArtefactError) as error:
        KVCompressor.from_pretrained(saved)
    assert message in str(error.value)


def test_tensors_that_do_not_fit_the_config_are_refused(
    saved: Path, geometry: Geometry, tmp_path: Path
) -> None:
    # Codebooks and their checksum from a scheme with other shapes.
    other = fitted(geometry, stream={"sharing": "layer"}).save_pretrained(tmp_path / "other")
    (saved / "codebooks.safetensors").write_bytes((other / "codebooks.safetensors").read_bytes())
    edit(
        saved, codebooks_sha256=json.loads((other / "config.json").read_text())["codebooks_sha256"]
    )
    with pytest.raises(ArtefactError, match="keys of layer 0: there are 8 codebooks of dim 4, giv"):
        KVCompressor.from_pretrained(saved)


def test_a_scheme_of_a_plugin_that_is_gone_is_told(saved: Path) -> None:
    stored = json.loads((saved / "config.json").read_text())["scheme"]
    stored["keys"]["grouping"] = {"type": "elsewhere", "dim": 4}
    edit(saved, scheme=stored, fingerprint=fingerprint(stored))
    with pytest.raises(SchemeError, match=r"scheme: keys\.grouping: no grouping is called 'elsewh"):
        KVCompressor.from_pretrained(saved)


def test_neither_a_folder_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(artefact, "snapshot_download", offline)
    with pytest.raises(ArtefactError, match=r"neither a folder here nor .* on the hub \(offline"):
        KVCompressor.from_pretrained("org/nothing")
    for no_id in (tmp_path / "nothing", "nothing", "./nothing", "../org/nothing"):
        with pytest.raises(ArtefactError, match="nothing: no such folder; an artefact on the hub"):
            KVCompressor.from_pretrained(no_id)


# -- other models ------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Any]:
    """An artefact for a tiny Llama, and that model's config."""
    config = tiny_config("llama")
    config._name_or_path = "org/tiny"
    made = Geometry.from_config(config)
    compressor = KVCompressor(scheme(), made, Provenance("org/tiny", {}))
    return compressor.fit(RandomStates(made)).save_pretrained(tmp_path / "tiny"), config


def test_its_own_model_fits_in_silence(tiny: tuple[Path, Any]) -> None:
    folder, config = tiny
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KVCompressor.from_pretrained(folder, config)


def test_another_geometry_is_refused_with_both_values(tiny: tuple[Path, Any]) -> None:
    folder, _ = tiny
    with pytest.raises(ArtefactError) as error:
        KVCompressor.from_pretrained(folder, tiny_config("llama-mqa"))
    assert "was made for another model" in str(error.value)
    assert "kv_heads: 2 != 1" in str(error.value)


def test_another_rope_is_refused_with_both_values(tiny: tuple[Path, Any]) -> None:
    folder, _ = tiny
    with pytest.raises(ArtefactError, match=r"rope.*default != yarn"):
        KVCompressor.from_pretrained(folder, tiny_config("llama-yarn"))


def test_another_model_id_only_warns(tiny: tuple[Path, Any]) -> None:
    folder, config = tiny
    config._name_or_path = "org/fine-tuned"
    with pytest.warns(UserWarning, match="calibrated on 'org/tiny', the model given is 'org/fine"):
        KVCompressor.from_pretrained(folder, config)


# -- writing all or nothing --------------------------------------------------------------------


def test_an_existing_folder_is_kept(saved: Path, geometry: Geometry) -> None:
    before = (saved / "config.json").read_bytes()
    with pytest.raises(ArtefactError, match="exists already: choose another folder, or overwrite"):
        fitted(geometry, residency={"sinks": 0}).save_pretrained(saved)
    assert (saved / "config.json").read_bytes() == before


def test_overwriting_on_purpose(saved: Path, geometry: Geometry) -> None:
    other = fitted(geometry, residency={"sinks": 0})
    other.save_pretrained(saved, overwrite=True)
    assert KVCompressor.from_pretrained(saved).identity() == other.identity()
    assert names(saved.parent) == ["artefact"]
    assert names(saved) == ["codebooks.safetensors", "config.json"]


def test_overwriting_spares_what_is_no_artefact(compressor: KVCompressor, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"holds more than .* \(thesis\.tex\)"):
        compressor.save_pretrained(home, overwrite=True)
    with pytest.raises(ArtefactError, match="is no folder"):
        compressor.save_pretrained(home / "thesis.tex", overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"


FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=["full disk", "interrupt"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an older one"])
@pytest.mark.parametrize("moment", ["codebooks", "config", "rename"])
def test_a_failure_leaves_the_older_artefact_or_nothing(
    moment: str,
    existing: bool,
    failure: BaseException,
    compressor: KVCompressor,
    geometry: Geometry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "artefact"
    if existing:
        compressor.save_pretrained(folder)
    other = fitted(geometry, residency={"sinks": 0})
    with monkeypatch.context() as patch:
        if moment == "codebooks":

            def half_written(tensors: dict[str, torch.Tensor], path: Path) -> None:
                Path(path).write_bytes(b"half of it")
                raise failure

            patch.setattr(artefact, "save_file", half_written)
        elif moment == "config":

            def no_text(self: Path, *args: Any, **kwargs: Any) -> int:
                raise failure

            patch.setattr(Path, "write_text", no_text)
        else:
            real = Path.rename

            def no_rename(self: Path, target: Any) -> Path:
                if self.name == "new":  # the last step: the older folder is out of the way already
                    raise failure
                return real(self, target)

            patch.setattr(Path, "rename", no_rename)
        with pytest.raises(type(failure)):
            other.save_pretrained(folder, overwrite=True)
    assert names(tmp_path) == (["artefact"] if existing else [])
    if existing:
        assert KVCompressor.from_pretrained(folder).identity() == compressor.identity()


def test_folders_have_the_users_own_permissions(saved: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert saved.stat().st_mode == plain.stat().st_mode


def test_missing_parents_are_made(compressor: KVCompressor, tmp_path: Path) -> None:
    compressor.save_pretrained(tmp_path / "a" / "b" / "c")
    KVCompressor.from_pretrained(tmp_path / "a" / "b" / "c")


# -- the hub -----------------------------------------------------------------------------------


def test_pushing_uploads_the_artefact(
    compressor: KVCompressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class FakeApi:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
            loaded = KVCompressor.from_pretrained(folder_path)
            calls.append((repo_id, names(folder_path), loaded.identity()))
            return "https://hub/commit"

    monkeypatch.setattr(artefact, "HfApi", FakeApi)
    assert compressor.push_to_hub("org/name", private=True) == "https://hub/commit"
    files = ["codebooks.safetensors", "config.json"]
    assert calls == [("org/name", True, True), ("org/name", files, compressor.identity())]


def test_loading_from_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert (name, sorted(allow_patterns)) == (
            "org/name",
            ["codebooks.safetensors", "config.json"],
        )
        return str(saved)

    monkeypatch.setattr(artefact, "snapshot_download", download)
    assert KVCompressor.from_pretrained("org/name").fitted
