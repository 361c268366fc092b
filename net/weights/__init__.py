"""Weights in other people's formats: safetensors, PyTorch's layout, ONNX, Caffe's caffemodel.

Names and layouts are listed in ``docs/formats.md``. Files that come in are untrusted: sizes and shapes are compared
with what the network needs before an array is read, and nothing is ever unpickled.
"""
