"""LM-Gaussian: three to sixteen unposed photos of a place to splats that one can walk around in.

    stage 0   poses and a cleaned cloud: `start_scene` = `ask_pairs`, `align_pointmaps`, `clean_cloud`   (C1: background-aware, depth-guided initialisation)
    stage 1   splats under photometric, depth, normal and virtual-view losses: `train_scene`     (C2: multi-modal regularisation)
    stage 2   a repair model of this very scene, repaired virtual views, rounds: `refine`        (C3: iterative refinement)
    stage 3   a path whose frames are enhanced: `enhance_video`                                    (C4: scene enhancement)

`reconstruct` runs them all, `Switches` turns each contribution off. What the paper takes from large models is asked through the protocols of
`priors.py`; embedded stand-ins answer where there are no weights, and the report names who answered.

Source: Hanyang Yu, Xiaoxiao Long, Ping Tan, "LM-Gaussian: Boost Sparse-view 3D Gaussian Splatting with Large Model Priors", 2024, arXiv 2409.03456.
"""

from surefoot.geometry.lm_gaussian.align import GlobalAlignment, align_pointmaps
from surefoot.geometry.lm_gaussian.backends import Backends, load_backends
from surefoot.geometry.lm_gaussian.clean import clean_cloud, clean_confidence, cloud_of
from surefoot.geometry.lm_gaussian.colmap import ColmapPrior
from surefoot.geometry.lm_gaussian.diffusers_repair import ControlNetParts, DiffusersControlNetRepair
from surefoot.geometry.lm_gaussian.enhance import (
    TemporalFilterEnhance,
    distill,
    enhance_video,
    render_path,
    smooth_path,
)
from surefoot.geometry.lm_gaussian.evaluate import perceptual_distance, refine_pose, score_pose_free, score_views
from surefoot.geometry.lm_gaussian.losses import (
    camera_tour,
    distance_weight,
    local_pearson_loss,
    normal_loss,
    pearson_depth_loss,
    photometric_loss,
    render_points,
    virtual_cameras,
)
from surefoot.geometry.lm_gaussian.networks import Dust3rPrior, MarigoldDepthPrior, MarigoldNormalsPrior, VggtPrior
from surefoot.geometry.lm_gaussian.pairs import PairStore, ask_pairs
from surefoot.geometry.lm_gaussian.priors import MultiView, PairPointmaps, all_pairs
from surefoot.geometry.lm_gaussian.repair import PatchDenoiserRepair
from surefoot.geometry.lm_gaussian.settings import Budget, Switches
from surefoot.geometry.lm_gaussian.simulated import OracleMonoPrior, OracleStereoPrior
from surefoot.geometry.lm_gaussian.stages import StageStore
from surefoot.geometry.lm_gaussian.start import Start, start_scene
from surefoot.geometry.lm_gaussian.system import LMGaussianResult, reconstruct, train_scene
from surefoot.geometry.lm_gaussian.train import (
    MultiModalLoss,
    Rates,
    collect_repair_pairs,
    refine,
    repaired_views,
    train_splats,
)
from surefoot.geometry.lm_gaussian.video import DiffusersVideoPrior

__all__ = [
    "Backends", "Budget", "ColmapPrior", "ControlNetParts", "DiffusersControlNetRepair", "DiffusersVideoPrior", "Dust3rPrior", "GlobalAlignment",
    "LMGaussianResult", "MarigoldDepthPrior", "MarigoldNormalsPrior", "MultiModalLoss", "MultiView", "OracleMonoPrior", "OracleStereoPrior",
    "PairPointmaps", "PairStore", "PatchDenoiserRepair", "Rates", "StageStore", "Start", "Switches", "TemporalFilterEnhance", "VggtPrior",
    "align_pointmaps", "all_pairs", "ask_pairs", "camera_tour", "clean_cloud", "clean_confidence", "cloud_of", "collect_repair_pairs",
    "distance_weight", "distill", "enhance_video", "load_backends", "local_pearson_loss", "normal_loss", "pearson_depth_loss",
    "perceptual_distance", "photometric_loss", "reconstruct", "refine", "refine_pose", "render_path", "render_points", "repaired_views",
    "score_pose_free", "score_views", "smooth_path", "start_scene", "train_scene", "train_splats", "virtual_cameras",
]  # fmt: skip
