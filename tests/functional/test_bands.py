import os
import subprocess
import sys
import threading

import pytest
import torch

from segheads.functional import upsample_argmax, upsample_cross_entropy
from segheads.functional.affinity import Scores, weighted_average
from segheads.functional.bands import can_run_in_bands, run_in_bands
from segheads.inference import InferenceProtocol
from segheads.inference.predict import predict_maps

SUBNORMAL = 1e-39


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def averaged(width):
    """The averages of eight channels by tiles, and all gradients."""
    generator = torch.Generator().manual_seed(0)
    values, grad = (torch.randn(3, 1100, 8, generator=generator) for _ in range(2))
    query, key = (torch.randn(3, 1100, width, generator=generator) for _ in range(2))
    leaves = [x.requires_grad_() for x in (values, query, key)]
    found = weighted_average(values, Scores(query, key, 0.3, cancels=True))
    return [found, *torch.autograd.grad(found, leaves, grad)]


@pytest.mark.parametrize(("width", "forward"), [(8, []), (40, [15])])  # equal widths: fused attention forward
def test_mean_shift_has_the_same_bits_for_any_number_of_threads(width, forward, monkeypatch):
    found, bands, watched = [], sys.modules["segheads.functional.bands"], []
    monkeypatch.setattr(bands, "run_in_bands", lambda *work: watched.append(work[0]) or run_in_bands(*work))
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        found.append(averaged(width)[0 if forward else 1 :])
    assert watched == 3 * [*forward, 15]  # five tiles of each image
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    monkeypatch.setattr(bands, "can_run_in_bands", lambda *_: False)
    torch.testing.assert_close(found[0], averaged(width)[0 if forward else 1 :], rtol=1e-4, atol=1e-5)


def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 150, 16, 16, generator=generator)
    return logits.requires_grad_(), torch.randint(150, (2, 200, 300), generator=generator)


def results():
    logits, labels = inputs()
    loss = upsample_cross_entropy(logits, labels)
    loss.backward()
    maps = predict_maps(
        lambda x: x, list(logits.detach()), InferenceProtocol(scales=(1.0, 1.5)), sizes=2 * [(200, 300)]
    )
    labels = upsample_argmax(logits, (200, 300), return_probability=True)
    return [loss.detach(), logits.grad, *labels, *(own.labels for own in maps)]


def test_bits_are_the_same_for_any_number_of_threads():
    found = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        found.append(results())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("K", "fewest"), [(1, 2), (2, 2), (19, 4)])
def test_few_classes_have_parts_for_several_threads(K, fewest, monkeypatch):
    counts = []

    def watched(count, *work):
        counts.append(count)
        run_in_bands(count, *work)

    for name in ("bands", "upsample"):
        monkeypatch.setattr(sys.modules[f"segheads.functional.{name}"], "run_in_bands", watched)
    logits = torch.randn(1, K, 32, 32, requires_grad=True)
    upsample_cross_entropy(logits, torch.zeros(1, 512, 512, dtype=torch.long)).backward()
    upsample_argmax(logits, (512, 512))
    divisor, *others = counts
    assert divisor == 1  # a part of each image
    assert others
    assert min(others) >= fewest


def test_parts_are_added_in_order_on_one_core_each():
    torch.set_num_threads(3)
    seen = []
    run_in_bands(20, lambda index: (index, torch.get_num_threads()), lambda index, part: seen.append((index, *part)))
    assert seen == [(index, index, 1) for index in range(20)]
    assert torch.get_num_threads() == 3
    of_others = []
    other = threading.Thread(target=lambda: of_others.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert of_others == [3]


def test_subnormal_numbers_are_flushed_in_bands_alone():
    number = torch.tensor([SUBNORMAL])
    flushes = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    if not flushes:
        pytest.skip("this processor keeps subnormal numbers")
    seen = []
    run_in_bands(1, lambda _: (number * 1.0).item(), lambda _, part: seen.append(part))
    assert seen == [0.0]
    assert (number * 1.0).item() > 0


def test_the_first_error_ends_the_work():
    torch.set_num_threads(2)

    def fail(index):
        if index == 3:
            raise RuntimeError("part 3")

    with pytest.raises(RuntimeError, match="part 3"):
        run_in_bands(1000, fail, lambda *_: None)
    logits, labels = inputs()
    labels[1, 90, 90] = 151
    with pytest.raises(ValueError, match="got 151"):
        upsample_cross_entropy(logits, labels)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_has_threads_of_its_own():
    script = """
import os, torch
from segheads.functional import upsample_cross_entropy
x, y = torch.randn(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)
torch.set_num_threads(2)
expected = upsample_cross_entropy(x, y)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(upsample_cross_entropy(x, y), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=180)


def test_threads_of_the_user_and_inference_mode():
    torch.set_num_threads(2)
    logits, labels = inputs()
    expected, found = results()[0], []

    def call():
        with torch.inference_mode():
            found.append(upsample_cross_entropy(logits, labels))
            upsample_argmax(logits, (96, 96))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(loss, expected) for loss in found)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores of threads are Linux'")
def test_threads_use_all_cores_where_the_caller_is_bound_to_one():
    script = """
import os, torch
from segheads.functional.bands import run_in_bands
print(len(os.sched_getaffinity(0)), torch.get_num_threads())
run_in_bands(2, lambda _: len(os.sched_getaffinity(0)), lambda _, cores: print(cores))
"""
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("there is one core")
    options = {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": str(cores), "OMP_PLACES": "cores"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | options, capture_output=True, text=True, check=True
    )
    bound, threads, *own = map(int, done.stdout.split())
    if bound == cores:
        pytest.skip("this OpenMP binds no threads")
    assert threads == cores
    assert own == [cores, cores]


def test_a_sandbox_may_keep_threads_on_their_cores(monkeypatch):
    def forbidden(*_):
        raise PermissionError

    bands = sys.modules["segheads.functional.bands"]
    monkeypatch.setattr(bands, "_cores_of_all", lambda _: {0})
    monkeypatch.setattr(os, "sched_setaffinity", forbidden, raising=False)
    torch.set_num_threads(3)
    seen = []
    bands._pool.cache_clear()
    run_in_bands(3, lambda _: torch.get_num_threads(), lambda _, cores: seen.append(cores))
    assert seen == [1, 1, 1]


def test_no_threads_at_import():
    script = "import threading, segheads; raise SystemExit(threading.active_count() - 1)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=180)


def test_tensors_that_stay_in_the_caller_s_thread():
    assert can_run_in_bands(torch.zeros(1))
    assert not can_run_in_bands(torch.zeros(1, device="meta"))
    assert not can_run_in_bands(torch.nn.Parameter(torch.zeros(1)))
