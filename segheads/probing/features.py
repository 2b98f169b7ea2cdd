"""Features of a frozen backbone on disk, batch by batch."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from segheads.data import IterationSampler, RareClasses, SegmentationDataset, TrainingSamples, collate_samples
from segheads.data.dataset import read_sample
from segheads.data.rare_classes import Key
from segheads.data.subset import SubsetDataset
from segheads.errors import SavedModelError
from segheads.files import whole_file, write_json
from segheads.modules import weights_hash

Keys = Sequence[Sequence[int]]  # of every sample of a batch
ABOUT = "about.json"


class FeatureCache:
    """Maps and labels of whole batches, one memory-mapped safetensors file each.

    The unit is a batch and not a sample, because the last bits of a sample's features can depend on how many others
    are computed with it: only so are results with and without the cache equal bit for bit.

    What the features depend on names the folder, so that another backbone, data set, size or precision can never be
    mistaken for this one. A file is written under another name and then renamed: what is there is whole.

    Args:
        folder: Where the cache lies; several runs may share it, one after the other or at once.
        about: All that the features depend on beside the samples' keys, in JSON values.

    Examples:
        >>> import tempfile
        >>> cache = FeatureCache(tempfile.mkdtemp(), {"backbone": "none"})
        >>> cache.save([(0, 3)], [torch.ones(1, 2, 4, 4)], torch.zeros(1, 64, 64, dtype=torch.uint8))
        >>> cache.load([(0, 3)])["maps"][0].shape, cache.load([(0, 4)])
        (torch.Size([1, 2, 4, 4]), None)
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.root = Path(folder)
        self.about = dict(about)
        self.folder = self.root / _digest(json.dumps(self.about, sort_keys=True).encode())

    def path(self, keys: Keys) -> Path:
        """The file of a batch."""
        return self.folder / f"{_digest(json.dumps([list(key) for key in keys]).encode())}.safetensors"

    def load(self, keys: Keys) -> dict[str, Any] | None:
        """`maps` and `labels` of a batch, or None where the cache does not have it.

        Args:
            keys: Epoch and index of each sample.

        Raises:
            SavedModelError: If the file is damaged.
        """
        path = self.path(keys)
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            raise SavedModelError(f"{path} is damaged ({error}); delete it, and it is made anew") from error
        if set(tensors) != {"labels", *(f"map_{i}" for i in range(len(tensors) - 1))}:
            raise SavedModelError(
                f"{path} holds {', '.join(sorted(tensors)[:5])}, not maps and labels; delete it, and it is made anew"
            )
        return {"maps": [tensors[f"map_{i}"] for i in range(len(tensors) - 1)], "labels": tensors["labels"]}

    def save(self, keys: Keys, maps: Sequence[Tensor], labels: Tensor) -> None:
        """Keep one batch.

        Args:
            keys: Epoch and index of each sample.
            maps: The backbone's, of the whole batch.
            labels: `(B, H, W)`, uint8 or int16.
        """
        tensors = {f"map_{i}": x.detach().cpu().contiguous() for i, x in enumerate(maps)}
        with whole_file(self.path(keys)) as temporary:
            save_file({**tensors, "labels": labels.cpu().contiguous()}, temporary)

    def prepare(self, batches: Iterable[Keys], bytes_per_image: int, limit: int) -> int:
        """Make the folder, if all that is still to be computed has room.

        Args:
            batches: The keys of every batch that will be asked for.
            bytes_per_image: Bytes of one image's maps and labels.
            limit: How many bytes the whole cache may take, whatever it already holds included.

        Returns:
            The bytes that will be written.

        Raises:
            ValueError: If the cache would outgrow its limit, or the disk.
        """
        known = {path.name for path in self.folder.glob("*.safetensors")}
        missing = {self.path(keys).name: len(keys) for keys in batches}
        needed = sum(count for name, count in missing.items() if name not in known) * bytes_per_image
        held = sum(_size(path) for path in self.root.rglob("*"))
        advice = f"go round in fewer batches (distinct_batches), or delete folders of {self.root}"
        if held + needed > limit:
            raise ValueError(
                f"the features still to be kept take {needed / 1e9:.3g} GB, {self.root} holds {held / 1e9:.3g} GB and "
                f"may take {limit / 1e9:.3g} GB; raise cache_gb, {advice}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"the features still to be kept take {needed / 1e9:.3g} GB and the disk of {self.root} has "
                f"{free / 1e9:.3g} GB left; {advice}"
            )
        write_json(self.folder / ABOUT, self.about)
        return needed


class CachedSamples(Dataset[dict[str, Tensor]]):
    """Whole batches: the maps that the cache has, else the collated samples for which they are still to be computed.

    To be given to a `DataLoader` with a `batch_sampler`, and `collate_fn=as_it_is`.

    Args:
        samples: What the keys stand for.
        cache: Where to look first.
    """

    def __init__(self, samples: TrainingSamples, cache: FeatureCache) -> None:
        self.samples, self.cache = samples, cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: list[Key]) -> dict[str, Any]:
        """The batch of these keys: `maps` and `labels`, or what `collate_samples` makes, with its `keys` `(B, n)`."""
        known = self.cache.load(keys)
        if known is not None:
            return known
        return {**collate_samples([self.samples[key] for key in keys]), "keys": torch.tensor(keys)}


def as_it_is(batch: Any) -> Any:
    """What came, for a `DataLoader` whose data set makes whole batches."""
    return batch


class RoundSampler:
    """Goes round in the first batches of an `IterationSampler`, in another order each time.

    Samples of `(epoch, index)` are always cropped and distorted in the same way, so that a frozen backbone need see
    each of these batches once only. The first round is in order: a run that does not get beyond it is the same as one
    without rounds. Pass it to a `DataLoader` as `batch_sampler`.

    Args:
        length: How many samples the data set has.
        batch_size: Samples per iteration, over all processes.
        seed: One number for the run.
        num_iterations: Iterations of the whole run.
        distinct: How many different batches there are; None means as many as iterations.
        start_iteration: The first iteration to yield, for a resumed run.
        rare: As in `IterationSampler`.

    Raises:
        ValueError: If a size is below 1, or the start lies outside the run.

    Examples:
        >>> list(RoundSampler(4, 2, seed=4, num_iterations=4, distinct=2))
        [[(0, 3), (0, 0)], [(0, 1), (0, 2)], [(0, 1), (0, 2)], [(0, 3), (0, 0)]]
    """

    drop_last = False  # accelerate asks; every batch is full

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        num_iterations: int,
        distinct: int | None = None,
        start_iteration: int = 0,
        rare: RareClasses | None = None,
    ) -> None:
        if distinct is not None and distinct < 1:
            raise ValueError(f"distinct must be 1 batch or more; got {distinct}")
        self.distinct = num_iterations if distinct is None else min(distinct, num_iterations)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.num_iterations, self.start_iteration, self.rare = num_iterations, start_iteration, rare
        self._sampler(num_iterations, start_iteration)  # refuses what is out of range

    def __len__(self) -> int:
        return self.num_iterations - self.start_iteration

    def __iter__(self) -> Iterator[list[Key]]:
        if self.distinct == self.num_iterations:
            yield from self._sampler(self.num_iterations, self.start_iteration)
            return
        distinct = list(self._sampler(self.distinct))
        last, order = 0, np.arange(self.distinct)
        for iteration in range(self.start_iteration, self.num_iterations):
            number, place = divmod(iteration, self.distinct)
            if number != last:
                last, order = number, np.random.default_rng([self.seed, number]).permutation(self.distinct)
            yield distinct[order[place]]

    def parts(self, process: int, processes: int) -> Iterator[list[Key]]:
        """What of each different batch goes to one of several processes, as Accelerate splits them."""
        size = self.batch_size // processes
        for batch in self._sampler(self.distinct):
            yield batch[process * size : (process + 1) * size]

    def _sampler(self, num_iterations: int, start: int = 0) -> IterationSampler:
        options = {"seed": self.seed, "num_iterations": num_iterations, "start_iteration": start}
        return IterationSampler(self.length, self.batch_size, **options, rare=self.rare)


def fingerprint_module(module: nn.Module) -> str:
    """A hash of a module's structure and of every weight and buffer."""
    return weights_hash(module, str(module).encode())


def fingerprint_data(dataset: SegmentationDataset) -> str:
    """A hash of a data set: its classes, the names of all samples, the first, middle and last of them, and its files.

    Of `files`, pairs of paths that data sets on disk have, sizes and times of change are looked at, not the contents.
    """
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    digest = hashlib.sha256(f"{kind} {len(dataset)} {dataset.class_names} {dataset.ignore_index}".encode())
    for index in range(len(dataset)):
        digest.update(dataset.name(index).encode() + b"\0")
    for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        image, labels = read_sample(dataset, index)
        digest.update(image.tobytes() + labels.numpy().tobytes())
    while isinstance(dataset, SubsetDataset):
        dataset = dataset.dataset
    pairs: Iterable[Sequence[Path]] = getattr(dataset, "files", ())
    for path in (path for pair in pairs for path in pair):
        status = os.stat(path)
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    """Bytes of a file; 0 of a folder, and of what another run has just renamed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
