"""`segheads list`, `segheads doctor`, `segheads completion`, and the help of all commands."""

import json
import shutil
import subprocess

import pytest
import torch

from segheads.cli import doctor, help_text, list_commands, main
from segheads.heads import HEADS, list_heads
from segheads.losses import LOSSES
from segheads.version import VERSION


def listed(capsys, *words):
    main(["list", *words, "--json"])
    return {entry["name"]: entry["description"] for entry in json.loads(capsys.readouterr().out)}


def test_registries_are_listed_with_a_line_on_each(capsys):
    assert list(listed(capsys, "heads")) == list_heads()
    for kind in ("datasets", "losses", "merges", "kernels", "metrics", "pyramids"):
        assert all(text.endswith(".") for text in listed(capsys, kind).values()), kind
    assert listed(capsys, "heads", "*transf*") == {"mask_transformer": HEADS["mask_transformer"].__doc__.split("\n")[0]}
    main(["list", "losses"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(LOSSES)


def test_backbones_are_timms(capsys):
    assert "resnet50" in listed(capsys, "backbones", "resnet5*")
    with_weights = listed(capsys, "backbones", "vit_tiny_patch16_224.*", "--pretrained")
    assert with_weights["vit_tiny_patch16_224.augreg_in21k_ft_in1k"] == "licence apache-2.0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["heads", "liner"], "none of 21 heads is called 'liner'; did you mean linear?"),
        (["losses", "zzz"], "none of 8 losses is called 'zzz'; a part of a name needs stars: \"*zzz*\""),
        (["heads", "--pretrained"], "--pretrained is of backbones; got heads"),
    ],
)
def test_names_that_are_not_there(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["list", *words])
    assert stop.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_doctor_of_a_sound_installation(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGHEADS_CACHE", str(tmp_path))
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a").write_bytes(b"12345")
    main(["doctor", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert (values["segheads"], values["problems"]) == (VERSION, [])
    assert values["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(values["optional"]) >= {"recipes", "tiff", "coco", "parquet"}
    (cpu, *_) = values["devices"]
    assert (cpu["device"], cpu["a step and a prediction"]) == ("cpu", "work")
    assert set(cpu["loss and label map"].values()) == {"tiles"}
    assert cpu["mean shift"] == "fused"
    assert values["caches"]["scans of labels"]["bytes"] == 5
    text = doctor.described({**values, "optional": {"tiff": {"tifffile": "1", "imagecodecs": None}}})
    assert '  tiff: tifffile 1; no imagecodecs (pip install "segheads[tiff]")' in text
    assert text.endswith("\nall is well")


def test_doctor_names_what_is_wrong(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEGHEADS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "path_of_loss", lambda *_: (_ for _ in ()).throw(doctor.SegheadsError("no kernels")))
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "nothing-of-this-name", "pyarrow; extra=='x'"])
    monkeypatch.setattr(doctor, "create_model", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of\nluck")))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    found = torch.__version__.partition("+")[0]
    assert any(f"torch is {found}" in line and "segheads needs >=99" in line for line in problems)
    assert "problem: nothing-of-this-name is missing, and segheads needs " in problems
    assert "problem: cpu: no kernels" in problems
    assert "problem: cpu: a tiny model fails: RuntimeError: out of luck" in problems
    assert any("file cannot be written; set SEGHEADS_CACHE to a folder that can" in line for line in problems)
    assert len(problems) == 5


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_and_options(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["completion", "bash"])
    assert stop.value.code in (0, None)
    (tmp_path / "script").write_text(capsys.readouterr().out)
    asked = 'source ./script; COMP_WORDS=(segheads pr); COMP_CWORD=1; _tyro_segheads; echo "${COMPREPLY[@]}"; '
    asked += 'COMP_WORDS=(segheads predict --over); COMP_CWORD=2; _tyro_segheads; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["predict probe", "--overlay"], done.stderr


def test_the_help_is_short_and_by_purpose(capsys):
    for words in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        lines = printed.splitlines()
        assert len(lines) < 40
        assert max(map(len, lines)) < 80
        assert {line for line in lines if line.endswith(":")} >= {"Train:", "Use:", "Measure and look inside:", "Help:"}
    assert all(f"  {name} " in printed for name in list_commands())
    told = help_text({**list_commands(), "own-command": "Do something else."})
    assert told.index("\nMore:\n  own-command Do something else.\n") > told.index("Help:")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"segheads {VERSION}\n"
