"""Data sets, and the way of their images into a model."""

from segheads.data.ade20k import ADE20K
from segheads.data.camvid import CamVid
from segheads.data.cityscapes import Cityscapes
from segheads.data.coco_stuff import COCOStuff10K
from segheads.data.config import DataConfig
from segheads.data.crop import RandomScaleCrop
from segheads.data.dataset import SegmentationDataset
from segheads.data.download import download_ade20k
from segheads.data.folder import FolderDataset
from segheads.data.images import read_image
from segheads.data.label_map import LabelMap
from segheads.data.pascal_context import PascalContext
from segheads.data.photometric import PhotometricDistortion, PhotometricNormalize
from segheads.data.registry import DATASETS, open_dataset
from segheads.data.resize import resize_keep_ratio, to_input
from segheads.data.samples import EvaluationSamples, IterationSampler, TrainingSamples, collate_samples
from segheads.data.scenes import Scenes
from segheads.data.subset import SubsetDataset

DATASETS |= {
    "ade20k": ADE20K,
    "camvid": CamVid,
    "cityscapes": Cityscapes,
    "coco_stuff_10k": COCOStuff10K,
    "pascal_context": PascalContext,
    "scenes": Scenes,
    "folder": FolderDataset,
}

__all__ = [
    "ADE20K",
    "DATASETS",
    "COCOStuff10K",
    "CamVid",
    "Cityscapes",
    "DataConfig",
    "EvaluationSamples",
    "FolderDataset",
    "IterationSampler",
    "LabelMap",
    "PascalContext",
    "PhotometricDistortion",
    "PhotometricNormalize",
    "RandomScaleCrop",
    "Scenes",
    "SegmentationDataset",
    "SubsetDataset",
    "TrainingSamples",
    "collate_samples",
    "download_ade20k",
    "open_dataset",
    "read_image",
    "resize_keep_ratio",
    "to_input",
]
