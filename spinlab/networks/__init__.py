"""Networks assembled from a stock model: rotated, quantized, and quantized in float64."""
