"""Weight quantization: the QuantizedWeight value, and the methods that make one (RTN, GPTQ)."""
