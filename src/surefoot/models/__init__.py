"""Small reference networks, and loading a user's model."""

from surefoot.models.networks import Normalized, Residual, mlp, seeded_build, small_cnn, small_cnn1d, small_resnet

__all__ = ["Normalized", "Residual", "mlp", "seeded_build", "small_cnn", "small_cnn1d", "small_resnet"]
