"""Weight quantization: the QuantizedWeight value, and the methods that make one.

quantized    levels, scales and zero points; saved, loaded, decoded
rtn          round to nearest, after a search for the range
gptq         round column by column, with a Hessian
mismatch     GPTAQ and Qronos: the same towards the outputs of the original
calibration  activations on their way through the layers
pairs        the same in two networks, the quantized one and its original
stacks       linears that read one input, those of one format in one sweep
layerwise    RTN, GPTQ, GPTAQ and Qronos over a whole model, one layer's progress at a time
lwc          RTN over a whole model, in ranges that are learned layer by layer
methods      what `weights.method` names
"""
