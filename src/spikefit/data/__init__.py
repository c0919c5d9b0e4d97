"""Data: readers for what users have on disk, as one value class, and deterministic batches."""

from spikefit.data.batches import batches, horizontal_flip, random_crop
from spikefit.data.dataset import Dataset
from spikefit.data.table import DATASETS, dataset_options, load_dataset

__all__ = ["DATASETS", "Dataset", "batches", "dataset_options", "horizontal_flip", "load_dataset", "random_crop"]
