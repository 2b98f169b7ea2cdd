import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from segheads.errors import OptionError, RunError
from segheads.training import RunFolder
from segheads.training.checkpoints import find_damage


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 3)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))


def test_the_last_checkpoints_are_kept_whole(tmp_path, prepared):
    accelerator, model, _ = prepared
    run = RunFolder(tmp_path, {}, keep=2)
    leftover = tmp_path / "checkpoints" / ".incomplete-00000002"
    leftover.mkdir(parents=True)  # of a run killed while it wrote
    (leftover / "model.safetensors").write_text("half a file")
    assert run.latest() == 0
    for iteration in (4, 8, 12):
        torch.nn.init.constant_(model.weight, iteration)
        run.save(accelerator, iteration)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000008", "00000012"]
    assert run.latest() == 12
    run.load(accelerator, 8)
    torch.testing.assert_close(model.weight, torch.full((3, 2), 8.0))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, prepared):
    accelerator, *_ = prepared
    run = RunFolder(tmp_path, {})
    run.save(accelerator, 4)
    other = Accelerator(cpu=True)
    other.prepare(nn.Linear(5, 7))
    with pytest.raises(RunError, match="checkpoint .*00000004 does not fit this model and optimizer"):
        run.load(other, 4)


def test_records_after_the_checkpoint_are_forgotten(tmp_path, prepared):
    run = RunFolder(tmp_path, {"seed": 0})
    run.start({"seed": 0})
    for iteration in (2, 4, 6):
        run.log({"iteration": iteration, "loss": 1.0})
    run.save(prepared[0], 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 8, "lo')  # killed while it wrote
    again = RunFolder(tmp_path, {"seed": 0}, resume=True)
    assert again.start({"seed": 0}) == 4
    assert [record["iteration"] for record in again.records()] == [2, 4]


def test_a_run_is_not_overwritten(tmp_path):
    RunFolder(tmp_path, {}).start({})
    with pytest.raises(FileExistsError, match=r"holds a run \(iteration 0\); resume it, or use another"):
        RunFolder(tmp_path, {})


def test_a_run_goes_on_as_it_began(tmp_path):
    config = {"seed": 0, "crop": (1, 2), "workers": 4}
    RunFolder(tmp_path, config).start(config)
    RunFolder(tmp_path, config | {"workers": 2}, resume=True, may_differ={"workers"})
    with pytest.raises(OptionError, match=r"config.json is of a run with another configuration: seed was 0 and is 1$"):
        RunFolder(tmp_path, config | {"seed": 1, "workers": 2}, resume=True, may_differ={"workers"})


def test_a_field_that_an_older_version_had_not_is_its_default(tmp_path):
    RunFolder(tmp_path, {"seed": 0}).start({"seed": 0})
    RunFolder(tmp_path, {"seed": 0, "scales": (1.0,)}, resume=True, defaults={"scales": (1.0,)})
    with pytest.raises(OptionError, match=r"scales was \[1.0\] and is \[0.5\]$"):
        RunFolder(tmp_path, {"seed": 0, "scales": (0.5,)}, resume=True, defaults={"scales": (1.0,)})


def test_nothing_to_resume_is_a_new_run(tmp_path):
    run = RunFolder(tmp_path / "new", {}, resume=True)
    assert run.start({}) == 0


def test_log_is_json(tmp_path):
    run = RunFolder(tmp_path, {})
    run.log({"iteration": 1, "mIoU": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"iteration": 1, "mIoU": None}


def test_what_an_older_configuration_lacks_counts_as_its_default(tmp_path):
    RunFolder(tmp_path, {"seed": 0}).start({"seed": 0})
    defaults = {"seed": 7, "loss": "ce"}
    RunFolder(tmp_path, {"seed": 0, "loss": "ce"}, resume=True, defaults=defaults)
    with pytest.raises(ValueError, match=r"another configuration: loss was 'ce' and is 'other'$"):
        RunFolder(tmp_path, {"seed": 0, "loss": "other"}, resume=True, defaults=defaults)


@pytest.fixture
def saved(tmp_path, prepared):
    """A run with the checkpoints 4 and 8, in which a weight is the number of the iteration."""
    accelerator, model, _ = prepared
    run = RunFolder(tmp_path, {"seed": 0})
    run.start({"seed": 0})
    for iteration in (4, 8):
        torch.nn.init.constant_(model.weight, iteration)
        run.log({"iteration": iteration})
        run.save(accelerator, iteration)
    return tmp_path


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HARMS = {
    "flipped": (flip_a_bit, "is not what was written"),
    "cut off": (cut_off, "bytes instead of"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(saved, prepared, caplog, name, harm):
    damage, words = HARMS[harm]
    newest = saved / "checkpoints" / "00000008"
    damage(newest / name)
    if name == "manifest.json" and harm == "missing":
        assert RunFolder(saved, {"seed": 0}, resume=True).find_start() == 8  # as a checkpoint of 0.1.0 has none
        return
    run = RunFolder(saved, {"seed": 0}, resume=True)
    assert run.start({"seed": 0}) == 4
    (message,) = caplog.messages
    assert message.startswith(f"checkpoint {newest} is damaged: ")
    assert (name in message and words in message) or name == "manifest.json"
    assert [record["iteration"] for record in run.records()] == [4]
    accelerator, model, _ = prepared
    run.load(accelerator, 4)
    torch.testing.assert_close(model.weight, torch.full((3, 2), 4.0))
    run.save(accelerator, 8)  # in the place of the damaged one
    assert sorted(path.name for path in newest.parent.iterdir()) == ["00000004", "00000008"]
    assert RunFolder(saved, {"seed": 0}, resume=True).find_start() == 8


@pytest.mark.parametrize("harm", ["cut off", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_damage_is_seen_without_a_manifest(saved, name, harm):
    """As 0.1.0 wrote checkpoints; that a bit was flipped need not be seen there."""
    newest = saved / "checkpoints" / "00000008"
    (newest / "manifest.json").unlink()
    assert find_damage(newest) is None
    HARMS[harm][0](newest / name)
    assert name in find_damage(newest)
    assert RunFolder(saved, {"seed": 0}, resume=True).find_start() == 4


def test_a_random_state_that_is_none_is_damage_without_a_manifest(saved):
    newest = saved / "checkpoints" / "00000008"
    (newest / "manifest.json").unlink()
    torch.save({"step": 0}, newest / "random_states_0.pkl")
    assert "random_states_0.pkl holds no random state" in find_damage(newest)


def test_checkpoints_none_of_which_is_whole_are_no_new_run(saved):
    for number in ("00000004", "00000008"):
        (saved / "checkpoints" / number / "optimizer.bin").unlink()
    with pytest.raises(RunError, match="none of the 2 checkpoints .* is whole .*00000008: optimizer.bin is missing"):
        RunFolder(saved, {"seed": 0}, resume=True).find_start()


@pytest.mark.parametrize("content", [None, '{"seed": '])
def test_checkpoints_without_a_configuration_are_of_no_known_run(saved, content):
    (saved / "config.json").unlink() if content is None else (saved / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config.json (cannot be read|is missing).*bring it back"):
        RunFolder(saved, {"seed": 0}, resume=True)
    with pytest.raises(FileExistsError, match=r"holds a run \(iteration 8\)"):
        RunFolder(saved, {"seed": 0})


def test_another_number_of_processes_is_said(saved, prepared, caplog):
    manifest = saved / "checkpoints" / "00000008" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "processes": 2}))
    RunFolder(saved, {"seed": 0}, resume=True).load(prepared[0], 8)
    assert "is of 2 process(es), and this run has 1" in caplog.text


def test_no_checkpoint_is_not_a_number_to_keep(tmp_path):
    with pytest.raises(ValueError, match="keep must be 1 checkpoint or more; got -1"):
        RunFolder(tmp_path, {}, keep=-1)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "segheads.training.checkpoints.write_json", "segheads.files.os.fsync"])
def test_a_full_disk_leaves_the_checkpoints_before(saved, prepared, monkeypatch, where):
    run = RunFolder(saved, {"seed": 0}, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(RunError, match="checkpoint of iteration 12 could not be written .*No space left on device"):
            run.save(prepared[0], 12)
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["00000004", "00000008"]
    assert run.find_start() == 8


def test_a_folder_that_is_gone_is_not_made_again(saved, prepared):
    run = RunFolder(saved, {"seed": 0}, resume=True)
    shutil.rmtree(saved)
    with pytest.raises(RunError, match=f"log of iteration 9 could not be written .{saved} is gone.*no checkpoint yet"):
        run.log({"iteration": 9})
    with pytest.raises(RunError, match="checkpoint of iteration 12 could not be written .* is gone"):
        run.save(prepared[0], 12)
    assert not saved.exists()


def test_what_killed_writers_left_goes(saved):
    (saved / ".incomplete-0-model").mkdir()
    (saved / ".incomplete-1-config.json").write_text("{")
    RunFolder(saved, {"seed": 0}, resume=True).start({"seed": 0})
    assert not list(saved.glob(".incomplete-*"))
