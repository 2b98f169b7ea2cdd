"""What a probe of many heads saves: eight heads on one frozen ViT-S against eight runs of one head each.

    OMP_NUM_THREADS=1 python recipes/benchmark/probe.py
    OMP_NUM_THREADS=1 python recipes/benchmark/probe.py --sets mixed --turns 5 --output runs/benchmark_probe.json

Both sides are the same code on the same batches, take turns in one process, and are timed in seconds of this process's
CPU, which a busy machine disturbs less than the clock on the wall. One run of eight heads is an iteration: the backbone
once, then every head's loss, gradients and update. Eight runs of one head are eight iterations with the backbone in
each. With the cache, the probe reads the maps from disk instead. The images are in memory: their loading, which eight
runs do eight times, is left out, and so are building, evaluation and saving.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from segheads import SegmentationModel, create_model
from segheads.cli.run import run
from segheads.plan import HeadChoice, parse_head
from segheads.probing import FeatureCache, Probe, SharedBackbone, build_probes, probe_step
from segheads.ranges import Range
from segheads.training import create_optimizer

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
# Heads, and at how many rates each is trained: eight runs in every set
SETS: dict[str, dict[str, int]] = {
    "linear": {"linear": 8},
    "light": {"linear": 3, "mean_shift": 3, "fcn": 1, "mask_transformer": 1},
    "transformers": {"mask_transformer": 4, "class_attention": 4},
    "mixed": {
        **{"linear": 1, "mean_shift": 1, "fcn": 1, "class_attention": 1, "mask_transformer": 1},
        **{"senformer @ simple(out_channels=128)": 1, "feature_fusion @ simple(out_channels=128)": 1},
        "uper(channels=64) @ simple(out_channels=64)": 1,
    },
}
HEAVY = ("senformer", "smp:unet", "uper")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    sets: tuple[str, ...] = ("linear", "light", "transformers", "mixed")
    """Sets of eight heads."""
    heavy: bool = True
    """Also measure what single heads cost at their default widths."""
    backbone: str = "vit_small_patch16_224"
    size: Annotated[int, Range(1)] = 224
    """Side of the images, pixels."""
    batch_size: Annotated[int, Range(1)] = 4
    classes: Annotated[int, Range(1)] = 19
    turns: Annotated[int, Range(1)] = 3
    """How often both sides take turns."""
    threads: Annotated[int, Range(1)] = 1
    output: Path | None = None
    """A JSON file for the numbers."""


def main(config: Config) -> dict[str, Any]:
    """Measure and print the tables."""
    if unknown := [name for name in config.sets if name not in SETS]:
        raise SystemExit(f"error: --sets {' '.join(unknown)} must be some of {' '.join(SETS)}")
    torch.set_num_threads(config.threads)
    accelerator = Accelerator(cpu=True)
    results: dict[str, Any] = {"heads": {}, "sets": {}}
    print(f"\n{config.backbone}, {config.size} x {config.size}, batch {config.batch_size}, {config.classes} classes\n")
    print("| eight heads | 8 runs, s | one probe, s | factor | with the cache, s | factor |\n|---|--:|--:|--:|--:|--:|")
    for name in config.sets:
        results["sets"][name] = row = measure_set(accelerator, config, SETS[name], results["heads"])
        heads = ", ".join(f"{head} ({count})" if count > 1 else head for head, count in SETS[name].items())
        print(
            f"| {heads} | {row['apart']:.2f} | {row['together']:.2f} | **{row['factor']:.1f}** | "
            f"{row['cached']:.2f} | **{row['factor_cached']:.1f}** |"
        )
    if config.heavy:
        for head in HEAVY:
            measure_set(accelerator, config, {head: 1}, results["heads"], once=True)
    print("\n| head | one update, s | of the backbone's forward pass |\n|---|--:|--:|")
    for head, (seconds, backbone) in results["heads"].items():
        print(f"| {head} | {seconds:.3f} | {seconds / backbone:.2f} |")
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def measure_set(
    accelerator: Accelerator,
    config: Config,
    heads: dict[str, int],
    costs: dict[str, tuple[float, float]],
    *,
    once: bool = False,
) -> dict[str, float]:
    """Median seconds of one iteration of a set of heads, apart and together, and the median of the ratios."""
    shared, probes = build(config, heads)
    images = torch.randn(config.batch_size, 3, config.size, config.size)
    labels = torch.randint(config.classes, (config.batch_size, config.size, config.size))
    step = partial(update, accelerator, shared)

    def run(own: list[Probe]) -> None:
        step(own, shared.compute(images), labels)

    with tempfile.TemporaryDirectory() as folder:
        cache, keys = FeatureCache(folder, {}), [(0, index) for index in range(config.batch_size)]
        maps = shared.compute(images)
        cache.save(keys, maps, labels.to(torch.uint8))
        for probe in probes:
            step([probe], maps, labels)  # warm
        apart, together, cached, backbone = [], [], [], []
        for _ in range(1 if once else config.turns):
            backbone.append(seconds(partial(shared.compute, images)))
            for probe in {str(probe.choice): probe for probe in probes}.values():
                known = costs.get(str(probe.choice))
                if known is None:
                    costs[str(probe.choice)] = (seconds(partial(step, [probe], maps, labels)), backbone[-1])
            if once:
                continue
            together.append(seconds(partial(run, probes)))
            apart.append(sum(seconds(partial(run, [probe])) for probe in probes))
            cached.append(seconds(lambda: step(probes, (cache.load(keys) or {})["maps"], labels)))
    if once:
        return {}
    return {
        "apart": statistics.median(apart),
        "together": statistics.median(together),
        "cached": statistics.median(cached),
        "backbone": statistics.median(backbone),
        "factor": statistics.median(a / b for a, b in zip(apart, together, strict=True)),
        "factor_cached": statistics.median(a / b for a, b in zip(apart, cached, strict=True)),
    }


def build(config: Config, heads: dict[str, int]) -> tuple[SharedBackbone, list[Probe]]:
    """The heads of a set, ready to learn, on one backbone of random weights."""

    def create(choice: HeadChoice) -> SegmentationModel:
        options = {**choice.create_kwargs(), "backbone_kwargs": {"img_size": config.size}, "pretrained": False}
        return create_model(config.backbone, choice.head, config.classes, **options)

    shared, probes = build_probes(create, [parse_head(head) for head in heads], RATES[: max(heads.values())], seed=0)
    counts = {str(parse_head(head)): count for head, count in heads.items()}
    chosen = [probe for probe in probes if RATES.index(probe.learning_rate) < counts[str(probe.choice)]]
    for probe in chosen:
        probe.prepared, rate = probe.model, probe.learning_rate
        probe.optimizer = create_optimizer(probe.model, "adamw", learning_rate=rate, weight_decay=0.01, momentum=0.9)
        probe.model.train()
    return shared, chosen


def update(
    accelerator: Accelerator, shared: SharedBackbone, probes: list[Probe], maps: list[Tensor], labels: Tensor
) -> None:
    """One update of the heads."""
    probe_step(accelerator, shared, probes, [(maps, labels)], seed=0, max_grad_norm=1.0)


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of this process's CPU that a call takes, over all its threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    run(main, Config, description=__doc__)
