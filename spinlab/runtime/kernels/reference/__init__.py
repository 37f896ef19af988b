"""The definition of every kernel in torch: any device, any float dtype, nothing fast."""
