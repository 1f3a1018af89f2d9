"""Layer-wise calibration: a trained float model and a few hundred unlabelled inputs become a 4-bit or mixed-bit model.

In your own code:

    from surefoot.quantization.layerwise_calibration import calibrate_pipeline, export_quantized

    report = calibrate_pipeline(model, inputs, kind="advanced", bits_w=4, bits_a=4)
    export = export_quantized(report.model)          # packed codes; export.weight_bytes == report.weight_bytes

The parts: `folding` (graph, batch-norm, quantized layers), `adaquant` (tuning a layer), `allocation` (bits by integer
programme), `statistics` (repair of mean, variance and bias), `pipeline` (all together, the export, the treatment).

Source: Itay Hubara, Yury Nahshan, Yair Hanani, Ron Banner, Daniel Soudry, "Improving Post Training Neural Quantization:
Layer-wise Calibration and Integer Programming", 2020, arXiv 2006.10518 (ICML 2021 as "Accurate Post Training Quantization
With Small Calibration Sets").
"""

from surefoot.quantization.layerwise_calibration.adaquant import (
    PAPER_RATES,
    Rates,
    adaquant,
    tune_layer,
    tune_layers,
)
from surefoot.quantization.layerwise_calibration.allocation import (
    BitAllocation,
    SensitivityTable,
    allocate_bits,
    layer_sensitivities,
)
from surefoot.quantization.layerwise_calibration.folding import (
    QuantizedLayer,
    fold_batchnorm,
    measure_ranges,
    quantized_layers,
    read_layout,
    swap_layers,
)
from surefoot.quantization.layerwise_calibration.pipeline import (
    CalibrationReport,
    LayerwiseCalibration,
    QuantizedExport,
    calibrate_pipeline,
    export_quantized,
    load_export,
    rebuild_quantized,
)
from surefoot.quantization.layerwise_calibration.statistics import rebatchnorm, tune_biases, tune_statistics

__all__ = [
    "BitAllocation",
    "CalibrationReport",
    "LayerwiseCalibration",
    "PAPER_RATES",
    "QuantizedExport",
    "QuantizedLayer",
    "Rates",
    "SensitivityTable",
    "adaquant",
    "allocate_bits",
    "calibrate_pipeline",
    "export_quantized",
    "fold_batchnorm",
    "layer_sensitivities",
    "load_export",
    "measure_ranges",
    "quantized_layers",
    "read_layout",
    "rebatchnorm",
    "rebuild_quantized",
    "swap_layers",
    "tune_biases",
    "tune_layer",
    "tune_layers",
    "tune_statistics",
]
