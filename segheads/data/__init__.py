"""Data sets, and the way of their images into a model."""

from segheads.data.ade20k import ADE20K
from segheads.data.camvid import CamVid
from segheads.data.crop import RandomScaleCrop
from segheads.data.dataset import SegmentationDataset
from segheads.data.download import DownloadError, download_ade20k
from segheads.data.folder import FolderDataset
from segheads.data.images import DataError, read_image
from segheads.data.photometric import PhotometricDistortion, PhotometricNormalize
from segheads.data.resize import resize_keep_ratio, to_input
from segheads.data.samples import IterationSampler, TrainingSamples, collate_samples
from segheads.data.scenes import Scenes

DATASETS = {"ade20k": ADE20K, "camvid": CamVid, "scenes": Scenes, "folder": FolderDataset}

__all__ = [
    "ADE20K",
    "DATASETS",
    "CamVid",
    "DataError",
    "DownloadError",
    "FolderDataset",
    "IterationSampler",
    "PhotometricDistortion",
    "PhotometricNormalize",
    "RandomScaleCrop",
    "Scenes",
    "SegmentationDataset",
    "TrainingSamples",
    "collate_samples",
    "download_ade20k",
    "read_image",
    "resize_keep_ratio",
    "to_input",
]
