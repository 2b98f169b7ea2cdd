import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from segheads.errors import OptionError, RunError
from segheads.training import RunFolder


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
