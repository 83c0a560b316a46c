"""LoRA adapters: tensors and alphas from files, names of the modules that they change, and a model's graph with them.

Only `graph` imports openvino.
"""
