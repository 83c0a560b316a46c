"""Pixel operations outside a model: decode, fit, mask, paste back, encode. No openvino."""
