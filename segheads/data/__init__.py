"""Data sets, and the way of their images into a model."""

from segheads.data.ade20k import ADE20K
from segheads.data.augment import Augment, mix_neighbours
from segheads.data.augmentation import AugmentationConfig
from segheads.data.camvid import CamVid
from segheads.data.cityscapes import Cityscapes
from segheads.data.coco import COCODataset
from segheads.data.coco_stuff import COCOStuff10K, COCOStuff164K
from segheads.data.config import DataConfig
from segheads.data.crop import RandomScaleCrop
from segheads.data.dataset import SegmentationDataset
from segheads.data.download import download_ade20k
from segheads.data.findings import Finding, find_problems
from segheads.data.folder import FolderDataset
from segheads.data.images import ImageForm, read_image
from segheads.data.label_map import LabelMap
from segheads.data.limits import pixel_limit
from segheads.data.pascal_context import PascalContext
from segheads.data.photometric import PhotometricDistortion, PhotometricNormalize
from segheads.data.rare_classes import RareClasses
from segheads.data.registry import DATASETS, open_dataset
from segheads.data.resize import resize_keep_ratio, to_input
from segheads.data.samples import EvaluationSamples, IterationSampler, TrainingSamples, collate_samples
from segheads.data.scan import DataScan, SplitScan, scan_splits
from segheads.data.scan_cache import default_cache
from segheads.data.scenes import Scenes
from segheads.data.subset import SubsetDataset
from segheads.data.voc import VOC2012, VOC2012Aug
from segheads.data.weights import class_weights

DATASETS |= {
    "ade20k": ADE20K,
    "camvid": CamVid,
    "cityscapes": Cityscapes,
    "coco_stuff_10k": COCOStuff10K,
    "coco_stuff_164k": COCOStuff164K,
    "pascal_context": PascalContext,
    "voc2012": VOC2012,
    "voc2012_aug": VOC2012Aug,
    "scenes": Scenes,
    "folder": FolderDataset,
    "coco": COCODataset,
}

__all__ = [
    "ADE20K",
    "DATASETS",
    "VOC2012",
    "Augment",
    "AugmentationConfig",
    "COCODataset",
    "COCOStuff10K",
    "COCOStuff164K",
    "CamVid",
    "Cityscapes",
    "DataConfig",
    "DataScan",
    "EvaluationSamples",
    "Finding",
    "FolderDataset",
    "ImageForm",
    "IterationSampler",
    "LabelMap",
    "PascalContext",
    "PhotometricDistortion",
    "PhotometricNormalize",
    "RandomScaleCrop",
    "RareClasses",
    "Scenes",
    "SegmentationDataset",
    "SplitScan",
    "SubsetDataset",
    "TrainingSamples",
    "VOC2012Aug",
    "class_weights",
    "collate_samples",
    "default_cache",
    "download_ade20k",
    "find_problems",
    "mix_neighbours",
    "open_dataset",
    "pixel_limit",
    "read_image",
    "resize_keep_ratio",
    "scan_splits",
    "to_input",
]
