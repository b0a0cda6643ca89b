"""The commands on a tiny model: JSON alone on stdout, errors on stderr, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_text
from vqkv import demo, models
from vqkv.cli import app
from vqkv.cli.plan import parse_memory
from vqkv.cli.progress import Report
from vqkv.errors import VQKVError
from vqkv.version import __version__

SCHEME = """
schema_version: 1
name: tiny
keys:
  rope: pre
  grouping: {type: contiguous, dim: 4}
  quantizer: {type: product, code_bits: 4, learner: {type: kmeans, iterations: 4}}
values:
  grouping: {type: contiguous, dim: 4}
  quantizer: {type: product, code_bits: 4, learner: {type: kmeans, iterations: 4}}
residency: {sinks: 2, window: 16}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two texts, a scheme and an artefact."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_checkpoint(folder / "model")
    (folder / "a.txt").write_text(tiny_text(400, seed=1))
    (folder / "b.txt").write_text(tiny_text(1200, seed=2))
    (folder / "scheme.yaml").write_text(SCHEME)
    calibrated = run("calibrate", folder / "model", *calibration(folder), "--out", folder / "art")
    assert calibrated.exit_code == 0, calibrated.stderr
    return folder


def calibration(folder: Path) -> list[Any]:
    return [
        *("--scheme", folder / "scheme.yaml", "--text", folder / "a.txt"),
        *("--tokens", 256, "--context", 64),
    ]


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def parsed(result: Result) -> dict[str, Any]:
    """Stdout as the one JSON object that it has to be."""
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def test_calibrate_json(place: Path, tmp_path: Path) -> None:
    result = run(
        "calibrate", place / "model", *calibration(place), "--out", tmp_path / "x", "--json"
    )
    data = parsed(result)
    assert data["bits_per_value"] == 1.0
    assert {"seconds_capture", "seconds_learn", "peak_rss_bytes", "side_bytes", "health"} <= set(
        data
    )
    assert not (tmp_path / "x.partial").exists()


def test_calibrate_refuses_an_existing_folder_unless_forced(place: Path, tmp_path: Path) -> None:
    args = ["calibrate", place / "model", *calibration(place), "--out", tmp_path / "x"]
    assert run(*args).exit_code == 0
    refused = run(*args, "--json")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "exists already" in refused.stderr
    assert run(*args, "--force").exit_code == 0


def test_calibrate_into_the_folder_one_is_in(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "here")
        result = run("calibrate", place / "model", *calibration(place), "--out", ".", "--force")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert run("inspect", tmp_path / "here", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--out", "art", "art exists already"),
        ("--scheme", "cq-4c9b", "no preset or file is called 'cq-4c9b'"),
        ("--text", "none.txt", "none.txt' cannot be read"),
        ("--context", "257", "windows of 257 tokens are longer than the model's 256 positions"),
    ],
)
def test_arguments_are_looked_at_before_the_model_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, message: str
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    given = value if option in ("--scheme", "--context") else place / value
    out = ("--out", place / "x", option, given)
    result = run("calibrate", place / "model", *calibration(place), *out)
    assert result.exit_code == 2
    assert message in result.stderr
    if option in ("--text", "--context"):
        measured = ("evaluate", place / "model", "--scheme", "scalar-2bit", "--tokens", 64)
        text = ("--text", place / "b.txt", "--context", 64)
        result = run(*measured, *text, option, given)
        assert result.exit_code == 2
        assert message in result.stderr


def test_the_type_that_a_model_runs_in(place: Path, tmp_path: Path) -> None:
    generated, evaluated = {}, {}
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        chosen = ("--scheme", "scalar-4bit", "--dtype", dtype, "--json")
        prompt = ("--prompt", tiny_text(20), "--max-new-tokens", 2)
        generated[dtype] = parsed(run("generate", place / "model", *chosen, *prompt))["cache_bytes"]
        evaluated[dtype] = parsed(
            run(
                *("evaluate", place / "model", *chosen, "--text", place / "b.txt"),
                *("--tokens", 32, "--context", 32, "--passages", 0, "--no-canary"),
            )
        )["dtype"]
    # Nothing of 20 tokens is coded, so the cache is its exact tail.
    assert generated["auto"] == generated["float32"] == 2 * generated["bfloat16"]
    assert generated["float16"] == generated["bfloat16"]
    assert evaluated == {name: name.replace("auto", "float32") for name in evaluated}

    arguments = ("calibrate", place / "model", *calibration(place), "--dtype", "bfloat16")
    assert run(*arguments, "--out", tmp_path / "x").exit_code == 0
    books = [folder / "codebooks.safetensors" for folder in (place / "art", tmp_path / "x")]
    assert books[0].read_bytes() != books[1].read_bytes()  # other states, other codewords
    refused = run(*arguments[:-1], "int8", "--out", tmp_path / "y")
    assert refused.exit_code == 2
    assert "--dtype" in refused.stderr


@pytest.mark.parametrize("device", ["cuda:97", "meta", "gpu"])
def test_a_device_that_is_not_there(place: Path, tmp_path: Path, device: str) -> None:
    scheme, text = ("--scheme", "scalar-4bit"), ("--text", place / "b.txt", "--context", 64)
    for arguments in (
        ("generate", place / "model", *scheme, "--prompt", "x"),
        ("evaluate", place / "model", *scheme, *text, "--tokens", 32),
        ("calibrate", place / "model", *calibration(place), "--out", tmp_path / "x"),
        ("compare", place / "model", *scheme, *text),
        ("tune", place / "model", "--bits", 2, *text, "--out", tmp_path / "y"),
    ):
        result = run(*arguments, "--device", device)
        assert result.exit_code == 2
        assert f"device '{device}' cannot be used" in result.stderr
        assert "this machine has cpu" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_seed_beyond_what_generators_take(place: Path, tmp_path: Path) -> None:
    result = run(
        *("calibrate", place / "model", *calibration(place), "--out", tmp_path / "x"),
        *("--seed", 2**70),
    )
    assert result.exit_code == 2
    assert "--seed" in result.stderr


@pytest.mark.parametrize("mode", ["before-use", "chunked"])
def test_evaluate_json(place: Path, mode: str) -> None:
    data = parsed(
        run(
            *(
                "evaluate",
                place / "model",
                "--compressor",
                place / "art",
                "--text",
                place / "b.txt",
            ),
            *("--tokens", 256, "--context", 128, "--chunk", 32, "--mode", mode),
            *("--passages", 0, "--no-canary", "--json"),
        )
    )
    expected = {
        *("mode", "tokens", "kl", "perplexity", "perplexity_exact", "top1_agreement"),
        *("repeated_passage", "repeated_passage_exact", "interval", "bits_per_value"),
        *("effective_bits_per_value", "cache_bytes", "cache_bytes_exact", "side_bytes"),
        *("canary_perplexity", "canary_ok"),
    }
    assert expected <= set(data)
    assert data["mode"] == mode
    assert data["kl"] > 0
    assert data["bits_per_value"] == 1.0


def test_evaluating_on_the_text_of_the_calibration_is_told(place: Path) -> None:
    result = run(
        *("evaluate", place / "model", "--compressor", place / "art", "--text", place / "a.txt"),
        *("--tokens", 64, "--context", 64, "--passages", 0, "--no-canary", "--json"),
    )
    (note,) = parsed(result)["notes"]
    assert f"note: {note}" in result.stderr
    assert "calibrated on this very text, a.txt" in note


def test_evaluate_fails_with_code_3_when_the_canary_sees_no_codes_read(place: Path) -> None:
    # With a window longer than the text no token is ever coded, so destroying codes does nothing.
    result = run(
        *("evaluate", place / "model", "--compressor", place / "art", "--text", place / "b.txt"),
        *("--tokens", 128, "--context", 128, "--mode", "chunked", "--window", 100000),
        *("--passages", 0, "--json"),
    )
    assert result.exit_code == 3, result.stderr
    assert json.loads(result.stdout)["canary_ok"] is False
    assert "canary" in result.stderr


def test_generate_json(place: Path) -> None:
    common = ("generate", place / "model", "--compressor", place / "art", "--json")
    prompt = ("--prompt", tiny_text(100), "--max-new-tokens", 6)
    decoded = parsed(run(*common, *prompt, "--read", "decode"))
    attended = parsed(run(*common, *prompt, "--read", "attend"))
    assert decoded["new_tokens"] == attended["new_tokens"] == 6
    assert decoded["text"] == attended["text"]
    assert decoded["cache_bytes"] > 0


def test_generate_with_a_data_free_scheme(place: Path) -> None:
    result = run(
        *("generate", place / "model", "--scheme", "scalar-4bit", "--prompt", "the cat"),
        *("--max-new-tokens", 3),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("the cat")


def test_a_scheme_that_learns_is_refused_without_calibration(place: Path) -> None:
    result = run(
        "generate", place / "model", "--scheme", "cq-4c8b", "--prompt", "the cat", "--json"
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "vqkv calibrate" in result.stderr


def test_either_a_compressor_or_a_scheme(place: Path) -> None:
    result = run("generate", place / "model", "--prompt", "the cat")
    assert result.exit_code == 2
    assert "--compressor DIR or --scheme NAME" in result.stderr


def test_an_empty_prompt_is_refused(place: Path) -> None:
    result = run("generate", place / "model", "--scheme", "scalar-4bit", "--prompt", "")
    assert result.exit_code == 2
    assert "prompt is empty" in result.stderr


def test_plan_json(place: Path) -> None:
    data = parsed(
        run(
            *("plan", place / "model", "--scheme", "cq-4c8b", "--memory", "1GB"),
            *("--context", 4096, "--batch", 2, "--json"),
        )
    )
    assert data["bits_per_value"] == 2.0
    assert data["bytes_per_token"] * 8 == data["bytes_per_token_exact"]
    assert data["longest_context"] > data["longest_context_exact"]
    assert data["context_fits"] is True


def test_plan_refuses_memory_that_the_weights_fill(place: Path) -> None:
    result = run("plan", place / "model", "--scheme", "cq-4c8b", "--memory", "10kB", "--json")
    assert result.exit_code == 2
    assert "weights take" in result.stderr


def test_a_model_config_with_a_field_of_a_wrong_type(place: Path, tmp_path: Path) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    result = run("plan", tmp_path, "--scheme", "cq-4c8b", "--memory", "1GB", "--json")
    assert result.exit_code == 2, result.exception
    assert "hidden_size" in result.stderr and str(tmp_path) in result.stderr


def test_plan_refuses_a_scheme_that_stores_nothing(place: Path, tmp_path: Path) -> None:
    nothing = "{grouping: {dim: 4}, quantizer: {type: product, code_bits: 0}}"
    (tmp_path / "nothing.yaml").write_text(
        f"name: nothing\nextends: cq-4c8b\nkeys: {nothing}\nvalues: {nothing}\n"
    )
    result = run("plan", place / "model", "--scheme", tmp_path / "nothing.yaml", "--memory", "1GB")
    assert result.exit_code == 2
    assert "stores 0 bits of a coded token" in result.stderr


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("22.5 GiB", int(22.5 * 2**30)),
        ("800m", 800 * 10**6),
        ("5000000", 5000000),
    ],
)
def test_memory_sizes(text: str, count: int) -> None:
    assert parse_memory(text) == count


def test_memory_beyond_all_machines() -> None:
    with pytest.raises(VQKVError, match=r"at most 1,000,000TB, given '99999"):
        parse_memory(400 * "9" + "GB")


def test_memory_without_a_unit_is_no_gigabytes() -> None:
    with pytest.raises(VQKVError, match="24 bytes hold no model: give a size such as 24GB"):
        parse_memory("24")


@pytest.mark.parametrize("text", ["", "GB", "12 parsecs", "-4GB", "4iB"])
def test_memory_sizes_that_are_none(text: str) -> None:
    with pytest.raises(VQKVError, match=r"24GB or 22\.5GiB"):
        parse_memory(text)


def test_inspect_json(place: Path) -> None:
    data = parsed(run("inspect", place / "art", "--json"))
    assert data["scheme"] == "tiny"
    assert data["calibration"]["tokens"] == 256
    assert data["health"]["codebooks"] > 0


def test_inspect_of_what_is_no_artefact(tmp_path: Path) -> None:
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 2
    assert "no vqkv artefact" in result.stderr


def test_schemes_list_in_a_pipe_is_a_line_per_name() -> None:
    lines = run("schemes", "list").stdout.splitlines()
    names = [line.split("\t")[0] for line in lines]
    assert {"cq-4c8b", "cq-8c8b", "rvq-2.875", "scalar-4bit"} <= set(names)
    assert names == sorted(names)
    assert [s["name"] for s in parsed(run("schemes", "list", "--json"))["schemes"]] == names


def test_schemes_show_prints_yaml_that_is_the_scheme(tmp_path: Path) -> None:
    shown = run("schemes", "show", "cq-4c8b").stdout
    (tmp_path / "again.yaml").write_text(shown)
    again = parsed(run("schemes", "validate", tmp_path / "again.yaml", "--json"))
    assert (
        again["fingerprint"] == parsed(run("schemes", "show", "cq-4c8b", "--json"))["fingerprint"]
    )
    assert yaml.safe_load(shown)["name"] == "cq-4c8b"


def test_schemes_validate_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(SCHEME.replace("code_bits", "code_bit"))
    result = run("schemes", "validate", tmp_path / "bad.yaml", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "bad.yaml" in result.stderr
    assert "keys.quantizer" in result.stderr
    assert "Did you mean 'code_bits'" in result.stderr


def test_schemes_schema_is_json() -> None:
    assert json.loads(run("schemes", "schema").stdout) == parsed(run("schemes", "schema", "--json"))


@pytest.mark.slow
def test_stdout_of_a_real_process_is_one_json_object(place: Path, tmp_path: Path) -> None:
    model, artefact = place / "model", ("--compressor", place / "art")
    commands: dict[str, tuple[Any, ...]] = {
        "fingerprint": ("inspect", place / "art"),
        "health": ("calibrate", model, *calibration(place), "--out", tmp_path / "x"),
        # Passages that do not fit and a canary that fails both have something to say.
        "notes": (
            *("evaluate", model, *artefact, "--text", place / "b.txt", "--window", 999),
            *("--tokens", 64, "--context", 64, "--mode", "chunked", "--passages", 1),
        ),
        "new_tokens": ("generate", model, *artefact, "--prompt", "the cat", "--max-new-tokens", 2),
        "weights_bytes": ("plan", model, "--scheme", "cq-4c8b", "--memory", "1GB"),
        "schemes": ("schemes", "list"),
    }
    for field, arguments in commands.items():
        command = [sys.executable, "-m", "vqkv", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == (3 if field == "notes" else 0), done.stderr
        assert field in json.loads(done.stdout)


@pytest.mark.slow
def test_the_demo_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (
        *(("CALIBRATION_TOKENS", 600), ("EVALUATION_TOKENS", 96)),
        *(("PROMPT_CHARACTERS", 300), ("NEW_TOKENS", 4)),
    ):
        monkeypatch.setattr(demo, name, size)
    told: list[str] = []
    real = demo.run_demo

    def run_demo(out: Path, progress: Report) -> demo.DemoResult:
        def tell(phase: str, done: int, total: int) -> None:
            told.append(f"{phase} {done}/{total}")
            progress(phase, done, total)

        return real(out, tell)

    monkeypatch.setattr(demo, "run_demo", run_demo)
    result = run("demo", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.stderr
    heads, *rows, _ = (line.split("\t") for line in result.stdout.splitlines())
    assert heads == list(demo.DemoResult.columns)
    names = ["exact", *(name for name in demo.SCHEMES for _ in range(2))]
    assert [row[0] for row in rows] == names
    assert all(len(row) == len(heads) for row in rows)
    assert told[:4] == [
        *("load the model 0/1", "load the model 1/1", "exact: generate 0/1", "exact: generate 1/1")
    ]
    for phase in ("canary persuasion", "cache persuasion", "generate"):
        assert {f"{demo.SCHEMES[1]}: {phase} {done}/1" for done in (0, 1)} <= set(told)
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [e["scheme"] for e in data["evaluations"]] == names[1:]
    assert all(e["canary_ok"] for e in data["evaluations"])
    assert set(data["continuations"]) == set(names)


@pytest.mark.slow
def test_errors_of_a_real_process(place: Path) -> None:
    command = [sys.executable, "-m", "vqkv", "plan", "no-such/model/at/all", "--scheme", "cq-4c8b"]
    done = subprocess.run([*command, "--memory", "1GB", "--json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no-such/model/at/all" in done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.strip() == __version__
