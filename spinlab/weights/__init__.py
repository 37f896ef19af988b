"""Weight quantization: the QuantizedWeight value, and the methods that make one (RTN, GPTQ, LWC).

quantized    levels, scales and zero points; saved, loaded, decoded
rtn          round to nearest, after a search for the range
gptq         round column by column, with a Hessian
calibration  activations on their way through the layers
layerwise    RTN and GPTQ over a whole model, one layer's progress at a time
lwc          RTN over a whole model, in ranges that are learned layer by layer
methods      what `weights.method` names
"""
