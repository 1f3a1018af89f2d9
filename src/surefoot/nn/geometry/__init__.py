"""Building blocks of 3D reconstruction: cameras, splats, a differentiable rasteriser, alignment, files and image metrics.

- `cameras`, `rotations`: one convention (OpenCV axes, w2c, pixel centres at + 0.5), poses, projection, interpolation
- `splats`, `harmonics`, `rasterizer`, `compositing`: a scene of 3D Gaussians and its pictures, differentiable in every input; `dense` checks it;
  `gsplat_backend` draws the same on a GPU
- `densification`: splats that come and go with their optimiser's moments
- `alignment`: rigid and similarity fits, pose errors
- `ply`, `camera_files`: splat scenes, point clouds and cameras as other programs read and write them
- `image_metrics`: PSNR, SSIM, MS-SSIM and a feature distance
"""
