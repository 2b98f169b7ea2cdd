"""An update is the same whether its batch is whole, or cut into parts of one process or of several."""

import subprocess
import sys
from functools import cache, partial

import pytest
import torch

SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from segheads import create_model
from segheads.training import train_step

def weights(loss, reduction, auxiliary, parts):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = create_model(
        "test_vit", "linear", 4, pretrained=False, loss=loss, loss_reduction=reduction, auxiliary_weight=auxiliary,
        auxiliary_kwargs={"num_layers": 0} if auxiliary else {},  # no batch norm
    )
    model.double().eval()  # without dropout; in fp32 the order of sums alone moves some weights by a thousandth
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(20):
        images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 4, (8, 32, 32), generator=generator)
        labels[0, 2:], labels[1], labels[6, :, :20] = 255, 255, 255
        size = 8 // accelerator.num_processes // parts
        own = slice(accelerator.process_index * size * parts, (accelerator.process_index + 1) * size * parts)
        batches = list(zip(images[own].split(size), labels[own].split(size), strict=True))
        loss = train_step(accelerator, model, optimizer, batches, max_grad_norm=1.0)
        losses.append(accelerator.reduce(loss, reduction="mean"))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return flat, torch.stack(losses)
"""

CASES = [("ce", "valid", 0.4), ("ce(weight=[1, 5, 1, 1]) + dice + focal", "valid", 0.0)]
exec(SCRIPT)
one_batch = cache(partial(weights, parts=1))  # noqa: F821


@pytest.mark.parametrize(("loss", "reduction", "auxiliary"), CASES)
@pytest.mark.parametrize("parts", [4])
def test_accumulated_parts(loss, reduction, auxiliary, parts):
    whole, losses = one_batch(loss, reduction, auxiliary)
    cut, of_parts = weights(loss, reduction, auxiliary, parts)  # noqa: F821
    torch.testing.assert_close(of_parts, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_two_processes(tmp_path):
    script = tmp_path / "updates.py"
    ask = f"[weights(*case, parts) for case in {CASES!r} for parts in (1, 2)]"
    script.write_text(f"{SCRIPT}\nfound = {ask}\nif Accelerator().is_main_process: torch.save(found, sys.argv[1])\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, str(script), str(tmp_path / "found.pt")], check=True, capture_output=True, timeout=300)
    found = iter(torch.load(tmp_path / "found.pt", weights_only=True))
    for loss, reduction, auxiliary in CASES:
        whole, losses = one_batch(loss, reduction, auxiliary)
        for _ in range(2):
            cut, of_processes = next(found)
            torch.testing.assert_close(of_processes, losses, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
