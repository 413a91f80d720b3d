"""A Mask R-CNN whose hot detection ops are Triton GPU kernels."""

from tmask.build import build_model
from tmask.config import CONVENTIONS, Convention, ModelConfig
from tmask.model.detector import MaskRCNN
from tmask.presets import PRESETS
from tmask.weights import load_torchvision

__all__ = ["CONVENTIONS", "PRESETS", "Convention", "MaskRCNN", "ModelConfig", "build_model", "load_torchvision"]
