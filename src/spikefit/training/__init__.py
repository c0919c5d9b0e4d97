"""Training: recipes, the loop on Lightning Fabric, checkpoints, evaluation and prediction."""

from spikefit.training.build import (
    Data,
    build_augmentation,
    build_data,
    build_driver,
    build_encoding,
    build_loss,
    build_model,
    build_optimizer,
    build_step,
    derive_seed,
)
from spikefit.training.checkpoint import Checkpoint, latest, load_checkpoint, save_checkpoint
from spikefit.training.evaluation import Prediction, evaluate, predict
from spikefit.training.launch import train
from spikefit.training.optimisation import AveragedWeights, learning_rate
from spikefit.training.progress import ProgressBar
from spikefit.training.recipe import Recipe, load_recipe
from spikefit.training.record import ProgressEvent, TrainRecord, environment

__all__ = [
    "AveragedWeights",
    "Checkpoint",
    "Data",
    "Prediction",
    "ProgressBar",
    "ProgressEvent",
    "Recipe",
    "TrainRecord",
    "build_augmentation",
    "build_data",
    "build_driver",
    "build_encoding",
    "build_loss",
    "build_model",
    "build_optimizer",
    "build_step",
    "derive_seed",
    "environment",
    "evaluate",
    "latest",
    "learning_rate",
    "load_checkpoint",
    "load_recipe",
    "predict",
    "save_checkpoint",
    "train",
]
