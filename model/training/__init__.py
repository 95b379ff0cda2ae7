"""Training: the autoencoder, then the video model, then its few-step student."""

from mirage_hello.model.training.config import PRESETS, TrainConfig, TrainingError, preset
from mirage_hello.model.training.loop import Options, train

__all__ = ["PRESETS", "Options", "TrainConfig", "TrainingError", "preset", "train"]
