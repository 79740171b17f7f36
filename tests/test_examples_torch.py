"""The examples that train end in seconds, without a network, and print what the guides quote."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.process

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"

pytest.importorskip("torch", reason="torch is not installed; these examples train with it")


def run(
    name: str, folder: pathlib.Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder, on one thread, with warnings as errors."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def quick(name: str, folder: pathlib.Path, *arguments: str) -> tuple[str, dict]:
    """Run an example's quick form; return what it printed and the record that it wrote."""
    done = run(
        name, folder, "--quick", "--threads", "1", "--out", "result", *arguments, PIP_NO_INDEX="1"
    )
    assert done.returncode == 0, done.stderr
    assert "fetching" not in done.stdout
    assert (folder / "result.png").stat().st_size > 5_000
    return done.stdout, json.loads((folder / "result.json").read_text())


def test_character_model_learns_with_every_attention(tmp_path):
    printed, record = quick("character_model.py", tmp_path, "--all")
    kinds = [result["kind"] for result in record["results"]]
    assert kinds == [
        "softmax",
        *(f"RACE {r} ({n}, {n})" for r in ("ratio", "bucket_mean") for n in (4, 2)),
    ]
    for result in record["results"]:
        assert result["loss"] < 2.4  # evenly spread over 21 characters it is 3.04
        assert result["curve"][0][1] > result["loss"]
        assert re.search(
            rf"^{re.escape(result['kind'])} +{result['loss']:.3f} ", printed, re.MULTILINE
        )


def test_character_model_times_steps(tmp_path):
    printed, record = quick("character_model.py", tmp_path, "--time")
    assert "context" in printed
    for result in record["results"]:
        assert [length for length, _ in result["ms"]] == [64, 128]


def test_pixel_digits(tmp_path):
    _, record = quick("pixel_digits.py", tmp_path)
    assert [result["kind"] for result in record["results"]] == [
        "softmax",
        "RACE ratio (4, 4)",
        "RACE ratio (2, 2)",
    ]
    for result in record["results"]:
        assert result["curve"][-1][1] > 0.3  # one in ten by chance


def test_convert_model(tmp_path):
    pytest.importorskip(
        "transformers",
        reason="transformers is not installed; this example converts one of its models",
    )
    _, record = quick("convert_model.py", tmp_path)
    results = record["results"]
    assert results["layers"] == [1, 3]
    assert results["converted"][-1][1] < results["converted"][0][1]
    assert results["same"][0] == results["same"][1]
    assert results["difference"] < 1e-4


def test_whoever_has_no_network_is_told_what_to_do(tmp_path):
    done = run(
        "pixel_digits.py",
        tmp_path,
        XDG_CACHE_HOME=str(tmp_path),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path),
    )
    assert done.returncode == 1
    assert "pip could not download it; is there a network" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_study_of_sparse_decoding_takes_the_rows_of_a_model_that_was_trained(tmp_path):
    done = run(
        "socket_study.py", tmp_path, "--quick", "--only", "real", "--out", "found", PIP_NO_INDEX="1"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found" / "study.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"layer 1", "layer 2"}
    mass = {
        (row["method"], row["part"]): row["mass"][0]
        for row in rows
        if row["table"] == "methods" and row["kept"] == 5
    }
    for part in ("layer 1", "layer 2"):
        assert mass["oracle", part] >= mass["signed_jl", part] > mass["random", part]
    assert "validation loss" in done.stdout


def test_the_rows_of_a_model_are_those_that_its_attention_gets(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import character_model
    import socket_methods
    import socket_real
    import torch
    from layers import SOFTMAX

    model = character_model.CharacterModel(
        9, character_model.Plan(dim=16, heads=2, layers=2, width=0), SOFTMAX
    )
    characters, outputs = torch.randint(9, (1, 40)), []
    cache = socket_real.last_rows(model, characters)
    assert (cache.query.shape, cache.key.shape, cache.value.shape) == (
        (1, 1, 4, 8),
        (1, 40, 4, 8),
        (1, 40, 4, 8),
    )
    for block in model.blocks[:-1]:
        block.attention.out.register_forward_pre_hook(
            lambda _, rows: outputs.append(rows[0][0, -1].detach().numpy())
        )
    model(characters)
    weights = socket_methods.true_weights(cache)
    np.testing.assert_allclose(
        np.einsum("ht,thd->hd", weights[0], cache.value[0]),
        np.concatenate(outputs).reshape(4, 8),
        atol=1e-5,
    )


@pytest.fixture
def data_sets(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import data_sets

    return data_sets


def test_every_kind_of_attention_starts_from_the_same_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import layers

    softmax, race = (
        layers.blocks(8, 2, 2, kind, is_causal=True, width=3, seed=5).state_dict()
        for kind in (layers.SOFTMAX, layers.Kind("ratio", 2, 3))
    )
    own = {f"{block}.attention.{name}" for block in (0, 1) for name in ("planes", "beta")}
    assert set(race) - set(softmax) == own
    assert not np.array_equal(race["0.attention.planes"], race["1.attention.planes"])
    for name, weight in softmax.items():
        assert np.array_equal(weight, race[name]), name


def test_markup_is_taken_out(data_sets):
    wikitext = """{{Infobox|a={{b|c}}}}'''Ants''' are [[Insect|insects]]\
<ref name="x">Smith</ref> of the [[family|clan]]
[[File:Ant.jpg|thumb|An [[ant]] at work]] Formicidae.<!-- sic -->
== Size ==
{| class="x"
| a || b
|}
* From 0.75 to 52&nbsp;mm [http://example.org see].
[[Category:Ants]]"""
    assert data_sets.plain(wikitext) == (
        "Ants are insects of the clan\n\nFormicidae.\n\nFrom 0.75 to 52 mm see."
    )


def test_data_that_changed_is_refused(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = data_sets.folder() / "file.txt"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"as it was")
    known = "5f94e26e2e4f1d5f3a3a3c8b7a0fdb5a0d9d4d2fd2b8a4f1b3e6d0e2f0c9b8a7"
    with pytest.raises(SystemExit, match="remove it and try again"):
        data_sets.member(["package"], "folder/file.txt", known)


def test_made_data_is_what_it_says(data_sets):
    text = data_sets.sentences(1000)
    assert len(text) == 1000
    assert text == data_sets.sentences(2000)[:1000]
    images, labels = data_sets.bars(50, size=10)
    assert images.shape == (50, 10, 10)
    assert np.array_equal(images.mean(axis=2).argmax(axis=1), labels)
